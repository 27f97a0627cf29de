//! `selvedge mqtt`: the users of the MQTT listener.

use std::io::{self, BufRead as _, IsTerminal as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use selvedge_broker::mqtt::password::set_user;
use selvedge_certs::Identity;

use crate::output;

/// `selvedge mqtt`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge mqtt passwd users.toml --user press-7 \\
    --identity spiffe://example.org/acme/plant-1/press-7")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Add a user to a password file, or change one's password and identity.
    Passwd(Passwd),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  selvedge mqtt passwd users.toml --user press-7 \\
    --identity spiffe://example.org/acme/plant-1/press-7
  head -1 password.txt | selvedge mqtt passwd users.toml --user press-7 \\
    --identity spiffe://example.org/acme/plant-1/press-7 \\
    --password-stdin

The broker reads the file that `passwords` in the table [mqtt] of broker.toml names.")]
struct Passwd {
    /// The password file; made if need be. It holds hashes, never passwords.
    file: PathBuf,
    /// Name the user logs in with.
    #[arg(long, value_name = "NAME")]
    user: String,
    /// Identity of whoever proves the password.
    #[arg(long, value_name = "URI")]
    identity: Identity,
    /// Take the password from the first line of standard input instead of asking for it.
    #[arg(long)]
    password_stdin: bool,
}

/// Runs the command.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Command::Passwd(args) = args.command;
    let password = if args.password_stdin || !io::stdin().is_terminal() {
        first_line()?
    } else {
        asked(&args.user)?
    };
    set_user(&args.file, &args.user, &args.identity, &password)
        .with_context(|| format!("set the password of {:?}", args.user))?;
    output::line(format_args!(
        "user {:?} of {} is {}",
        args.user,
        args.file.display(),
        args.identity
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn first_line() -> anyhow::Result<String> {
    let mut line = String::new();
    io::stdin()
        .lock()
        .read_line(&mut line)
        .context("read the password from standard input")?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

fn asked(user: &str) -> anyhow::Result<String> {
    let ask = |prompt: String| rpassword::prompt_password(prompt).context("read the password");
    let password = ask(format!("password of {user:?}: "))?;
    if password != ask("the same again: ".to_owned())? {
        bail!("expected the same password twice, found two; nothing was changed");
    }
    Ok(password)
}
