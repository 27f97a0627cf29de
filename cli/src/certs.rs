//! `selvedge certs`: make an authority, issue certificates, revoke and explain them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use selvedge_certs::{
    Authority, AuthorityError, CertificateSummary, IssueRequest, LoadError, Overwrite,
    RevocationList, Serial, explain,
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::output;

const DAY: Duration = Duration::from_secs(86_400);

/// `selvedge certs`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge certs init --dir pki --trust-domain example.org
  selvedge certs issue --dir pki --tenant acme --site cloud --name broker \\
    --server --dns localhost --ip 127.0.0.1
  selvedge certs issue --dir pki --tenant acme --site plant-1 --name press-7
  selvedge certs show pki/acme/plant-1/press-7/cert.pem
  selvedge certs revoke --dir pki acme/plant-1/press-7")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

impl Args {
    pub(crate) fn json(&self) -> bool {
        matches!(&self.command, Command::Show(show) if show.json)
    }
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make an authority: DIR/ca.pem, which every peer trusts, and DIR/ca.key, which signs.
    Init(Init),
    /// Issue a certificate: DIR/TENANT/SITE/NAME/cert.pem and key.pem.
    Issue(Issue),
    /// Revoke certificates: DIR/crl.pem, which brokers are given as `identity.crl`.
    Revoke(Revoke),
    /// Say what the certificates in a file are, and what they may be used for; or what a revocation
    /// list revokes.
    Show(Show),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  selvedge certs init --dir pki --trust-domain example.org")]
struct Init {
    /// Folder of the authority; made if need be.
    #[arg(long, value_name = "DIR", default_value = "pki")]
    dir: PathBuf,
    /// First part of every identity, usually a domain of your organisation.
    #[arg(long, value_name = "NAME")]
    trust_domain: String,
    /// Replace an authority that is there. Every certificate it issued becomes worthless.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge certs issue --dir pki --tenant acme --site plant-1 --name press-7
  selvedge certs issue --dir pki --tenant acme --site cloud --name broker \\
    --server --dns broker.example.org --ip 127.0.0.1")]
struct Issue {
    /// Folder of the authority.
    #[arg(long, value_name = "DIR", default_value = "pki")]
    dir: PathBuf,
    /// Tenant of the identity; nothing is seen across tenants.
    #[arg(long)]
    tenant: String,
    /// Site of the identity.
    #[arg(long)]
    site: String,
    /// Name of the identity within its site.
    #[arg(long)]
    name: String,
    /// A certificate that brokers may use. Others may dial only.
    #[arg(long)]
    server: bool,
    /// Host name that the broker is reached by; may be given again.
    #[arg(long, value_name = "HOST", requires = "server")]
    dns: Vec<String>,
    /// Address that the broker is reached by; may be given again.
    #[arg(long, value_name = "ADDRESS", requires = "server")]
    ip: Vec<IpAddr>,
    /// Days that it is valid for.
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..))]
    days: u32,
    /// Replace a certificate and key that are there.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge certs revoke --dir pki acme/plant-1/press-7
  selvedge certs revoke --dir pki stolen/cert.pem
  selvedge certs revoke --dir pki --serial 4f1a2b
  selvedge certs revoke --dir pki

The list is written whole, with what was on it before. The last line makes a first list, or
renews the one that is there. A broker takes the list over at SIGHUP: who is connected with a
certificate on it is disconnected. An identity is not revoked by this: issue it a new certificate,
or deny it in the policy.")]
struct Revoke {
    /// TENANT/SITE/NAME, whose certificate is in the folder, or the file of a certificate.
    #[arg(value_name = "NAME|FILE")]
    certificates: Vec<String>,
    /// Serial number of a certificate, as logs name it; may be given again.
    #[arg(long, value_name = "HEX")]
    serial: Vec<Serial>,
    /// Folder of the authority.
    #[arg(long, value_name = "DIR", default_value = "pki")]
    dir: PathBuf,
    /// Days until the list should be renewed. Brokers warn of one that is older.
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..))]
    days: u32,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  selvedge certs show pki/acme/plant-1/press-7/cert.pem")]
struct Show {
    /// PEM file with certificates or revocation lists.
    file: PathBuf,
    /// Write a JSON object for each.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Init(args) => init(&args)?,
        Command::Issue(args) => issue(args)?,
        Command::Revoke(args) => revoke(&args)?,
        Command::Show(args) => show(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn init(args: &Init) -> anyhow::Result<()> {
    let Init {
        dir,
        trust_domain,
        force,
    } = args;
    Authority::init(dir, trust_domain, overwrite(*force))
        .map_err(explained)
        .with_context(|| format!("make an authority in {}", dir.display()))?;
    output::line(format_args!(
        "authority of {trust_domain}\n  certificate {}   every peer needs it\n  key         {}   \
         keep it secret: it can issue any identity",
        dir.join("ca.pem").display(),
        dir.join("ca.key").display(),
    ))?;
    Ok(())
}

fn issue(args: Issue) -> anyhow::Result<()> {
    let dir = args.dir;
    let authority = load(&dir)?;
    let mut request = if args.server {
        IssueRequest::server(args.tenant, args.site, args.name)
    } else {
        IssueRequest::client(args.tenant, args.site, args.name)
    };
    request.dns = args.dns;
    request.ips = args.ip;
    let request = request.validity(DAY * args.days);
    let paths = authority
        .issue_into(&dir, &request, overwrite(args.force))
        .map_err(explained)
        .context("issue a certificate")?;
    output::line(format_args!(
        "certificate of spiffe://{}/{}/{}/{}\n  certificate {}\n  key         {}",
        authority.trust_domain(),
        request.tenant,
        request.site,
        request.name,
        paths.cert.display(),
        paths.key.display(),
    ))?;
    if args.server && request.dns.is_empty() && request.ips.is_empty() {
        output::note(
            "note: without --dns and --ip no client can check that it reached this broker",
        );
    }
    Ok(())
}

fn revoke(args: &Revoke) -> anyhow::Result<()> {
    let dir = &args.dir;
    let authority = load(dir)?;
    // Everything is looked up before anything is written, so that a misspelt name revokes nothing.
    let mut wanted: Vec<(Serial, String)> = args
        .certificates
        .iter()
        .map(|name| {
            let file = certificate_of(dir, name)?;
            let pem = std::fs::read(&file).with_context(|| format!("read {}", file.display()))?;
            (authority.serial_of(&pem)).with_context(|| format!("revoke {}", file.display()))
        })
        .collect::<anyhow::Result<_>>()?;
    let named = args.serial.iter();
    wanted.extend(named.map(|serial| (serial.clone(), format!("certificate (serial {serial})"))));
    let serials: Vec<Serial> = wanted.iter().map(|(serial, _)| serial.clone()).collect();
    let written = authority
        .revoke(dir, &serials, DAY * args.days)
        .with_context(|| format!("write the revocation list in {}", dir.display()))?;
    for (serial, title) in &wanted {
        let verb = if written.added.contains(serial) {
            "revoked"
        } else {
            "already revoked:"
        };
        output::line(format_args!("{verb} {title}"))?;
    }
    let list = &written.list;
    output::line(format_args!(
        "list {}: number {}, {} revoked, renew it before {}",
        written.path.display(),
        list.number.as_deref().unwrap_or("none"),
        list.revoked.len(),
        list.next_update.and_then(timestamp).unwrap_or_default(),
    ))?;
    if !written.added.is_empty() {
        output::note(
            "note: brokers act on it once they have the file as identity.crl and are sent SIGHUP",
        );
    }
    Ok(())
}

/// The file of the certificate that was meant.
fn certificate_of(dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let candidates = [PathBuf::from(name), dir.join(name).join("cert.pem")];
    candidates
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "expected TENANT/SITE/NAME with a certificate in {}, or the file of a certificate, \
                 found {}",
                dir.display(),
                output::escaped(name)
            )
        })
}

fn load(dir: &Path) -> anyhow::Result<Authority> {
    Authority::load(dir).with_context(|| {
        format!(
            "load the authority in {}; make one with `selvedge certs init`",
            dir.display()
        )
    })
}

fn show(args: &Show) -> anyhow::Result<()> {
    let file = args.file.display();
    let pem = std::fs::read(&args.file).with_context(|| format!("read {file}"))?;
    let now = SystemTime::now();
    let lists = RevocationList::all_from_pem(&pem).with_context(|| format!("explain {file}"))?;
    for list in &lists {
        if args.json {
            output::line(json_of_list(list, &args.file, now))?;
        } else {
            output::line(list)?;
            if list.is_overdue(now) {
                output::line("overdue      renew it: selvedge certs revoke --dir DIR")?;
            }
        }
    }
    let summaries = match explain(&pem, now) {
        Err(LoadError::NoCertificate { .. }) if !lists.is_empty() => Vec::new(),
        summaries => summaries.with_context(|| format!("explain {file}"))?,
    };
    for (index, summary) in summaries.iter().enumerate() {
        if args.json {
            output::line(json(summary, &args.file))?;
        } else {
            if summaries.len() > 1 {
                output::line(format_args!(
                    "certificate {} of {}",
                    index + 1,
                    summaries.len()
                ))?;
            }
            output::line(summary)?;
        }
    }
    Ok(())
}

fn json(summary: &CertificateSummary, file: &Path) -> Value {
    let (identity, identity_error) = match &summary.identity {
        Ok(identity) => (Some(identity.to_string()), None),
        Err(error) => (None, Some(error.to_string())),
    };
    json!({
        "file": file.display().to_string(),
        "identity": identity,
        "identity_error": identity_error,
        "subject": summary.subject,
        "issuer": summary.issuer,
        "serial": summary.serial,
        "not_before": timestamp(summary.not_before),
        "not_after": timestamp(summary.not_after),
        "validity": summary.validity,
        "valid_now": summary.valid_now,
        "uris": summary.uris,
        "dns_names": summary.dns_names,
        "ip_addresses": summary.ip_addresses,
        "key_type": summary.key_type,
        "is_authority": summary.is_authority,
        "purposes": summary.purposes,
        "fingerprint": summary.fingerprint,
    })
}

fn json_of_list(list: &RevocationList, file: &Path, now: SystemTime) -> Value {
    let revoked: Vec<Value> = list
        .revoked
        .iter()
        .map(|revoked| {
            json!({
                "serial": revoked.serial.to_string(),
                "since": timestamp(revoked.since),
            })
        })
        .collect();
    json!({
        "file": file.display().to_string(),
        "issuer": list.issuer,
        "number": list.number,
        "this_update": timestamp(list.this_update),
        "next_update": list.next_update.and_then(timestamp),
        "overdue": list.is_overdue(now),
        "revoked": revoked,
    })
}

/// A time as RFC 3339 has it, or nothing when it is outside the calendar.
fn timestamp(time: SystemTime) -> Option<String> {
    let seconds = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_secs()).ok()?,
        Err(before) => -i64::try_from(before.duration().as_secs()).ok()?,
    };
    let time = OffsetDateTime::from_unix_timestamp(seconds).ok()?;
    time.format(&Rfc3339).ok()
}

fn overwrite(force: bool) -> Overwrite {
    if force { Overwrite::Yes } else { Overwrite::No }
}

fn explained(error: AuthorityError) -> anyhow::Error {
    let exists = matches!(error, AuthorityError::Exists { .. });
    let error = anyhow::Error::new(error);
    if exists {
        error.context("nothing was written, --force would replace what is there")
    } else {
        error
    }
}
