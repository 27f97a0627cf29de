//! `selvedge token`: the bearer tokens of the front door.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use selvedge_broker::front::token;
use selvedge_certs::Identity;

use crate::{fabric, output};

/// `selvedge token`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge token create tokens.toml --name notebook \\
    --identity spiffe://example.org/acme/office/ann --out token
  selvedge token list tokens.toml
  selvedge token remove tokens.toml --name notebook

The broker reads the file that `tokens` in the table [front] of broker.toml names, at its start and
at SIGHUP. It holds hashes, never tokens.")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a token for an identity, in place of the one of the same name.
    Create(Create),
    /// Take a token out of a file.
    Remove(Remove),
    /// Name the tokens of a file and who holds them.
    List(List),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge token create tokens.toml --name notebook \\
    --identity spiffe://example.org/acme/office/ann --out token
  curl -H \"Authorization: Bearer $(cat token)\" https://broker.example:8000/v1/models")]
struct Create {
    /// The file of tokens; made if need be.
    file: PathBuf,
    /// Name of the token, for people.
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Identity of whoever has the token. Policy says what it may ask.
    #[arg(long, value_name = "URI")]
    identity: Identity,
    /// Write the token to this file, which only its owner may read, instead of printing it.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge token remove tokens.toml --name notebook")]
struct Remove {
    /// The file of tokens.
    file: PathBuf,
    /// Name of the token.
    #[arg(long, value_name = "NAME")]
    name: String,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge token list tokens.toml")]
struct List {
    /// The file of tokens.
    file: PathBuf,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Create(args) => {
            let token = token::create(&args.file, &args.name, &args.identity)
                .with_context(|| format!("make the token {:?}", args.name))?;
            match args.out {
                None => output::line(token)?,
                Some(out) => {
                    fabric::write_secret(&out, &token)?;
                    output::line(format_args!(
                        "token {:?} of {} is {}; it is in {}",
                        args.name,
                        args.file.display(),
                        args.identity,
                        out.display()
                    ))?;
                }
            }
        }
        Command::Remove(args) => {
            token::remove(&args.file, &args.name)
                .with_context(|| format!("remove the token {:?}", args.name))?;
            output::line(format_args!("token {:?} is gone", args.name))?;
        }
        Command::List(args) => {
            for token in token::list(&args.file).context("list the tokens")? {
                output::line(format_args!("{}  {}", token.name, token.identity))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
