//! Withdrawing certificates: the authority's revocation list, which is also all it remembers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
use x509_parser::certificate::X509Certificate;

use super::{Authority, AuthorityError, CA_KEY, REVOCATIONS, files, moment};
use crate::certificate;
use crate::credentials::{Origin, certificates};
use crate::revocation::{self, RevocationList, Revoked, Serial};

/// The revocation list of an authority after [`Authority::revoke`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevocationFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it says.
    pub list: RevocationList,
    /// What was not withdrawn before.
    pub added: Vec<Serial>,
}

impl Authority {
    /// The serial number of a certificate of this authority, the first in a PEM text, and the
    /// certificate in a few words.
    ///
    /// # Errors
    /// The text holds no certificate, or that of another authority.
    pub fn serial_of(&self, cert_pem: &[u8]) -> Result<(Serial, String), AuthorityError> {
        let origin = Origin("certificate".into());
        let chain = certificates(&origin, cert_pem)?;
        let leaf = chain.first().map_or(&[][..], |leaf| leaf.as_ref());
        let leaf = certificate::parse(leaf)?;
        let title = certificate::title(&leaf);
        let issued_here = self.with_certificate(|own| {
            own.subject().as_raw() == leaf.issuer().as_raw()
                && revocation::is_signed_by(
                    own,
                    &leaf.signature_algorithm,
                    leaf.tbs_certificate.as_ref(),
                    &leaf.signature_value.data,
                )
        })?;
        if !issued_here {
            return Err(AuthorityError::NotIssuedHere {
                certificate: title,
                issuer: certificate::subject(leaf.issuer()),
            });
        }
        Ok((Serial::from_raw(leaf.raw_serial()), title))
    }

    /// Withdraws certificates: writes `dir/crl.pem` anew with what is in it and `serials`, a number
    /// that is one higher, and a next update after `validity`. Without serials that makes the first
    /// list, or renews the one that is there. If all are withdrawn already, nothing is written.
    ///
    /// The list is read back from that file, since it is signed and what brokers act on: a record
    /// beside it could only come to differ. The file appears whole or not at all, and of two
    /// processes at once one waits.
    ///
    /// # Errors
    /// The list that is there is damaged or another authority's; it is left as it is.
    pub fn revoke(
        &self,
        dir: &Path,
        serials: &[Serial],
        validity: Duration,
    ) -> Result<RevocationFile, AuthorityError> {
        let path = dir.join(REVOCATIONS);
        let _lock = files::lock(&dir.join(CA_KEY))?;
        let held = files::read_if_there(&path)?
            .map(|pem| self.read_list(&path, &pem))
            .transpose()?;
        let now = SystemTime::now();
        let mut revoked: BTreeMap<Serial, SystemTime> = held
            .iter()
            .flat_map(|list| &list.revoked)
            .map(|Revoked { serial, since }| (serial.clone(), *since))
            .collect();
        let mut added = Vec::new();
        for serial in serials {
            if !revoked.contains_key(serial) {
                revoked.insert(serial.clone(), now);
                added.push(serial.clone());
            }
        }
        if let Some(list) = &held
            && added.is_empty()
            && !serials.is_empty()
        {
            return Ok(RevocationFile {
                path,
                list: list.clone(),
                added,
            });
        }
        let number = match held.as_ref().and_then(|list| list.number.as_deref()) {
            None => 1,
            Some(number) => number
                .parse::<u64>()
                .ok()
                .and_then(|number| number.checked_add(1))
                .ok_or_else(|| AuthorityError::Unusable {
                    path: path.clone(),
                    reason: format!("expected a number below 2^64, found {number}"),
                })?,
        };
        let next_update = now.checked_add(validity).ok_or(AuthorityError::Validity {
            reason: "it ends outside the calendar".into(),
        })?;
        let pem = CertificateRevocationListParams {
            this_update: moment(now)?,
            next_update: moment(next_update)?,
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked
                .iter()
                .map(|(serial, since)| {
                    Ok(RevokedCertParams {
                        serial_number: SerialNumber::from_slice(serial.as_bytes()),
                        revocation_time: moment(*since)?,
                        reason_code: None,
                        invalidity_date: None,
                    })
                })
                .collect::<Result<_, AuthorityError>>()?,
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)?
        .pem()?;
        let list = self.read_list(&path, &pem)?;
        files::replace(&path, &pem)?;
        Ok(RevocationFile { path, list, added })
    }

    /// The one list of a PEM text, which must be this authority's.
    fn read_list(&self, path: &Path, pem: &str) -> Result<RevocationList, AuthorityError> {
        let unusable = |reason: String| AuthorityError::Unusable {
            path: path.to_owned(),
            reason,
        };
        let origin = Origin(path.display().to_string());
        let ders = revocation::lists(&origin, pem.as_bytes())?;
        let [der] = ders.as_slice() else {
            return Err(unusable(format!(
                "expected one revocation list, found {}; move it away to begin a new one",
                ders.len()
            )));
        };
        let list = revocation::parse(&origin, der)?;
        let own = self.with_certificate(|own| {
            revocation::is_signed_by(
                own,
                &list.signature_algorithm,
                list.tbs_cert_list.as_ref(),
                &list.signature_value.data,
            )
        })?;
        if !own {
            return Err(unusable(format!(
                "it is not signed by this authority (issuer {}); move it away to begin a new list",
                certificate::subject(list.issuer())
            )));
        }
        Ok(RevocationList::of(&list))
    }

    fn with_certificate<T>(
        &self,
        ask: impl FnOnce(&X509Certificate<'_>) -> T,
    ) -> Result<T, AuthorityError> {
        let chain = certificates(&Origin("authority".into()), self.ca_pem.as_bytes())?;
        let der = chain.first().map_or(&[][..], |own| own.as_ref());
        Ok(ask(&certificate::parse(der)?))
    }
}
