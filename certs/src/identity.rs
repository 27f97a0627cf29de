//! The name of a peer: a SPIFFE URI of the form `spiffe://<trust-domain>/<tenant>/<site>/<name>`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::certificate::printable;

/// The start of every SPIFFE URI.
const SCHEME: &str = "spiffe://";
/// A segment longer than this helps nobody and does not fit on a screen.
const MAX_SEGMENT: usize = 128;
/// The longest trust domain the SPIFFE standard allows.
const MAX_TRUST_DOMAIN: usize = 255;
/// The longest SPIFFE URI the standard asks every implementation to support.
const MAX_URI: usize = 2048;

/// Who a peer is: `spiffe://<trust-domain>/<tenant>/<site>/<name>`.
///
/// Cheap to clone. Two identities are equal when their URIs are, byte for byte.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    uri: Arc<str>,
    /// Where the trust domain ends in `uri`; the others likewise. The URI has at most 2048 bytes.
    trust_domain_end: u16,
    tenant_end: u16,
    site_end: u16,
}

impl Identity {
    /// Puts an identity together from its parts, or says which part is wrong.
    pub fn new(
        trust_domain: &str,
        tenant: &str,
        site: &str,
        name: &str,
    ) -> Result<Self, IdentityError> {
        check_trust_domain(trust_domain)?;
        check_segment(Segment::Tenant, tenant)?;
        check_segment(Segment::Site, site)?;
        check_segment(Segment::Name, name)?;
        let uri = format!("{SCHEME}{trust_domain}/{tenant}/{site}/{name}");
        if uri.len() > MAX_URI {
            return Err(IdentityError::TooLong { found: uri.len() });
        }
        let offset = |bytes: usize| u16::try_from(bytes).expect("a URI has at most 2048 bytes");
        let trust_domain_end = SCHEME.len() + trust_domain.len();
        let tenant_end = trust_domain_end + 1 + tenant.len();
        let site_end = tenant_end + 1 + site.len();
        Ok(Self {
            uri: uri.into(),
            trust_domain_end: offset(trust_domain_end),
            tenant_end: offset(tenant_end),
            site_end: offset(site_end),
        })
    }

    /// The organisation that issued the certificate, such as `plant.example`.
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..usize::from(self.trust_domain_end)]
    }

    /// The tenant, which bounds everything the peer can see.
    pub fn tenant(&self) -> &str {
        &self.uri[usize::from(self.trust_domain_end) + 1..usize::from(self.tenant_end)]
    }

    /// The site, which residency and nearness refer to.
    pub fn site(&self) -> &str {
        &self.uri[usize::from(self.tenant_end) + 1..usize::from(self.site_end)]
    }

    /// The name of the device, service or broker within its site.
    pub fn name(&self) -> &str {
        &self.uri[usize::from(self.site_end) + 1..]
    }

    /// The whole URI.
    pub fn uri(&self) -> &str {
        &self.uri
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.uri)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        if uri.len() > MAX_URI {
            return Err(IdentityError::TooLong { found: uri.len() });
        }
        let Some(rest) = uri.strip_prefix(SCHEME) else {
            return Err(IdentityError::Scheme {
                found: printable(uri),
            });
        };
        let parts: Vec<&str> = rest.split('/').collect();
        match parts.as_slice() {
            [trust_domain, tenant, site, name] => Self::new(trust_domain, tenant, site, name),
            _ => Err(IdentityError::Path {
                found: printable(uri),
            }),
        }
    }
}

/// The first part of an identity: lower-case letters, digits, dots, dashes and underscores.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The trust domain without a scheme, such as `plant.example`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        check_trust_domain(name)?;
        Ok(Self(name.into()))
    }
}

/// A part of the path of an identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment {
    /// The first part.
    Tenant,
    /// The second part.
    Site,
    /// The third part.
    Name,
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tenant => "tenant",
            Self::Site => "site",
            Self::Name => "name",
        })
    }
}

/// Why something is not an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The URI has another scheme, or none.
    #[error("expected a URI spiffe://<trust-domain>/<tenant>/<site>/<name>, found `{found}`")]
    Scheme {
        /// The start of what was found.
        found: String,
    },
    /// The path does not have three segments.
    #[error(
        "expected three path segments, spiffe://<trust-domain>/<tenant>/<site>/<name>, found `{found}`"
    )]
    Path {
        /// The start of what was found.
        found: String,
    },
    /// The trust domain has characters it may not have, or a wrong length.
    #[error("expected a trust domain of 1 to 255 characters from a-z 0-9 . - _, found `{found}`")]
    TrustDomain {
        /// The start of what was found.
        found: String,
    },
    /// A path segment has characters it may not have, or a wrong length.
    #[error(
        "expected a {segment} of 1 to 128 characters from A-Z a-z 0-9 . - _, other than `.` and `..`, found `{found}`"
    )]
    Segment {
        /// Which part is wrong.
        segment: Segment,
        /// The start of what was found.
        found: String,
    },
    /// The URI is longer than 2048 bytes.
    #[error("expected a SPIFFE URI of at most 2048 bytes, found {found} bytes")]
    TooLong {
        /// Its length in bytes.
        found: usize,
    },
    /// The certificate has no URI in its subject alternative name.
    #[error(
        "expected one URI spiffe://<trust-domain>/<tenant>/<site>/<name> in the subject alternative name, found none"
    )]
    Missing,
    /// The certificate has several URIs in its subject alternative name, so it names nobody.
    #[error(
        "expected one URI spiffe://<trust-domain>/<tenant>/<site>/<name> in the subject alternative name, found {found}"
    )]
    Ambiguous {
        /// How many URIs there are.
        found: usize,
    },
    /// The certificate cannot be read at all.
    #[error("expected an X.509 certificate, found bytes that are not one ({reason})")]
    Malformed {
        /// What the parser tripped over.
        reason: String,
    },
    /// The peer did not present a certificate.
    #[error("expected a peer certificate, found none; the connection is anonymous")]
    NoCertificate,
}

fn check_trust_domain(name: &str) -> Result<(), IdentityError> {
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
    if name.is_empty() || name.len() > MAX_TRUST_DOMAIN || !name.bytes().all(allowed) {
        return Err(IdentityError::TrustDomain {
            found: printable(name),
        });
    }
    Ok(())
}

fn check_segment(segment: Segment, text: &str) -> Result<(), IdentityError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    let relative = text == "." || text == "..";
    if text.is_empty() || text.len() > MAX_SEGMENT || relative || !text.bytes().all(allowed) {
        return Err(IdentityError::Segment {
            segment,
            found: printable(text),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn segment() -> impl Strategy<Value = String> {
        "[A-Za-z0-9._-]{1,128}".prop_filter("relative segments are refused", |text| {
            text != "." && text != ".."
        })
    }

    proptest! {
        #[test]
        fn what_was_put_together_can_be_taken_apart(
            trust_domain in "[a-z0-9._-]{1,255}",
            tenant in segment(),
            site in segment(),
            name in segment(),
        ) {
            let identity = Identity::new(&trust_domain, &tenant, &site, &name).unwrap();
            prop_assert_eq!(identity.trust_domain(), trust_domain.as_str());
            prop_assert_eq!(identity.tenant(), tenant.as_str());
            prop_assert_eq!(identity.site(), site.as_str());
            prop_assert_eq!(identity.name(), name.as_str());
            prop_assert_eq!(identity.to_string().parse::<Identity>().unwrap(), identity);
        }

        #[test]
        fn whatever_parses_prints_as_it_was(text in "(spiffe://)?[ -~]{0,40}(/[a-z./]{0,4}){0,4}") {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.uri(), text.as_str());
            }
        }

        #[test]
        fn no_text_panics_and_every_error_is_one_printable_line(text in "\\PC*|.{0,60}") {
            for text in [text.clone(), format!("spiffe://{text}"), format!("spiffe://a/b/c/{text}")] {
                if let Err(error) = text.parse::<Identity>() {
                    let message = error.to_string();
                    prop_assert!(!message.contains(char::is_control), "{message:?}");
                    prop_assert!(message.len() < 1024, "{message:?}");
                }
            }
        }
    }

    #[test]
    fn hostile_uris_are_refused_with_their_reason() {
        let scheme = |found: &str| IdentityError::Scheme {
            found: found.into(),
        };
        let path = |found: &str| IdentityError::Path {
            found: found.into(),
        };
        let segment = |segment, found: &str| IdentityError::Segment {
            segment,
            found: found.into(),
        };
        let domain = |found: &str| IdentityError::TrustDomain {
            found: found.into(),
        };
        let table = [
            ("", scheme("")),
            ("https://a/b/c/d", scheme("https://a/b/c/d")),
            ("SPIFFE://a/b/c/d", scheme("SPIFFE://a/b/c/d")),
            (" spiffe://a/b/c/d", scheme(" spiffe://a/b/c/d")),
            ("spiffe://a", path("spiffe://a")),
            ("spiffe://a/b/c", path("spiffe://a/b/c")),
            ("spiffe://a/b/c/d/", path("spiffe://a/b/c/d/")),
            ("spiffe://a/b/c/d/e", path("spiffe://a/b/c/d/e")),
            ("spiffe:///b/c/d", domain("")),
            ("spiffe://A.example/b/c/d", domain("A.example")),
            ("spiffe://a:443/b/c/d", domain("a:443")),
            ("spiffe://user@a/b/c/d", domain("user@a")),
            ("spiffe://a/b//d", segment(Segment::Site, "")),
            ("spiffe://a/../c/d", segment(Segment::Tenant, "..")),
            ("spiffe://a/b/./d", segment(Segment::Site, ".")),
            ("spiffe://a/b/c/d?x=1", segment(Segment::Name, "d?x=1")),
            ("spiffe://a/b/c/d#x", segment(Segment::Name, "d#x")),
            ("spiffe://a/b/c/%64", segment(Segment::Name, "%64")),
            ("spiffe://a/b/c/d\n", segment(Segment::Name, "d\\n")),
            ("spiffe://a/b/c/\u{430}", segment(Segment::Name, "\\u{430}")),
            ("spiffe://a/b/c/+", segment(Segment::Name, "+")),
        ];
        for (uri, expected) in table {
            assert_eq!(uri.parse::<Identity>(), Err(expected), "{uri:?}");
        }
        let long = "x".repeat(129);
        assert!(matches!(
            Identity::new("a", "b", "c", &long),
            Err(IdentityError::Segment {
                segment: Segment::Name,
                ..
            })
        ));
        assert!(Identity::new("a", "b", "c", &long[1..]).is_ok());
        assert_eq!(
            format!("spiffe://{}", "/".repeat(4000)).parse::<Identity>(),
            Err(IdentityError::TooLong { found: 4009 })
        );
    }
}
