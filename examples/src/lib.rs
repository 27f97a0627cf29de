//! What every example needs: a broker's address and an identity from the command line.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use selvedge_client::{Client, Options};

/// Connects as the first two arguments say, and returns the others.
///
/// The arguments are the broker's address, and the directory of an identity as `selvedge certs
/// issue` writes it: `cert.pem` and `key.pem` in `<pki>/<tenant>/<site>/<name>`, with the
/// authority's `ca.pem` at the top.
pub async fn connect(usage: &str) -> Result<(Client, Vec<String>)> {
    let mut arguments = std::env::args().skip(1);
    let (Some(broker), Some(identity)) = (arguments.next(), arguments.next()) else {
        bail!("usage: <broker> <identity directory> {usage}");
    };
    let identity = Path::new(&identity);
    let top = identity.ancestors().nth(3);
    let top = top.context("expected an identity directory <pki>/<tenant>/<site>/<name>")?;
    let options = Options::new(&broker)?.identity_files(
        &top.join("ca.pem"),
        &identity.join("cert.pem"),
        &identity.join("key.pem"),
    )?;
    let client = Client::connect(options).await?;
    Ok((client, arguments.collect()))
}
