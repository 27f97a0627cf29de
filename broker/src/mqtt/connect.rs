//! From the first bytes of an MQTT client to its session, or to the reason why not.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use selvedge_certs::Identity;
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::TopicName;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::fabric::Fabric;
use crate::mqtt::exchange;
use crate::mqtt::packet::{self, Connect, Packet, ProtocolError, Reader};
use crate::mqtt::password::Passwords;
use crate::mqtt::properties;
use crate::mqtt::reason::Reason;
use crate::policy::{Decision, IdentityPolicy, LivePolicy, Verb};
use crate::revocation::Peer;
use crate::session::{SessionKey, Will};
use crate::tenant;

/// What is known of a peer before its CONNECT.
#[derive(Debug)]
pub(crate) enum Proof {
    /// Its identity: everyone's on a plaintext listener.
    Known(Identity),
    /// Its identity, from its certificate.
    Certificate {
        identity: Identity,
        /// Ends the connection when the certificate is withdrawn.
        peer: Peer,
    },
    /// Nothing yet: user name and password are to prove it.
    Password(Passwords),
    /// Nothing, and nothing but a certificate would do.
    Missing,
}

/// A client that may have its session.
#[derive(Debug)]
pub(crate) struct Greeting {
    pub(crate) identity: Identity,
    pub(crate) policy: LivePolicy,
    /// What to ask of the tenant.
    pub(crate) attach: tenant::Connect,
    /// The client gave itself no name.
    pub(crate) assigned_client_id: bool,
    /// The session will be kept for less than the client asked for.
    pub(crate) expiry_reduced: bool,
}

/// Why a client is not let in.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The connection ended first.
    Closed,
    /// It is told so in a CONNACK, where its version has a word for it.
    Answer {
        reason: Reason,
        text: String,
        /// Label of the counter of refused connections.
        label: &'static str,
    },
    /// Its bytes are not MQTT.
    Protocol(ProtocolError),
}

impl Refusal {
    pub(crate) fn answer(reason: Reason, label: &'static str, text: impl Into<String>) -> Self {
        Self::Answer {
            reason,
            text: text.into(),
            label,
        }
    }
}

/// Reads the CONNECT.
pub(crate) async fn read<R: AsyncRead + Unpin>(
    reader: &mut Reader,
    stream: &mut R,
    buffer: &mut BytesMut,
) -> Result<Box<Connect>, Refusal> {
    loop {
        match reader.next(buffer).map_err(Refusal::Protocol)? {
            Some(Packet::Connect(connect)) => return Ok(connect),
            Some(_) => {
                return Err(Refusal::Protocol(ProtocolError::new(
                    Reason::PROTOCOL_ERROR,
                    "something other than CONNECT first",
                )));
            }
            None => {}
        }
        match stream.read_buf(buffer).await {
            Ok(0) | Err(_) => return Err(Refusal::Closed),
            Ok(_) => {}
        }
    }
}

/// Checks a CONNECT: who it is, what its session is, and whether its will may be published.
pub(crate) async fn greet(
    fabric: &Arc<Fabric>,
    proof: &Proof,
    connect: &mut Connect,
) -> Result<Greeting, Refusal> {
    if connect.wants_auth {
        return Err(Refusal::answer(
            Reason::BAD_AUTHENTICATION_METHOD,
            "auth_method",
            "expected a certificate or user name and password, found an authentication method",
        ));
    }
    let identity = identify(fabric, proof, connect).await?;
    let policy = LivePolicy::new(fabric, &identity);
    let will = match connect.will.take() {
        Some(will) => Some(
            check_will(will, &policy.now()).map_err(|refusal| match refusal {
                WillRefusal::Denied(status) => {
                    fabric.metrics.deny("publish");
                    fabric.tenant(&identity).refused(&identity, &status);
                    Refusal::answer(Reason::of_refusal(&status), "will", status.message)
                }
                WillRefusal::Protocol(error) => Refusal::Protocol(error),
            })?,
        ),
        None => None,
    };
    let assigned_client_id = connect.client_id.is_empty();
    let name = if assigned_client_id {
        format!("auto-{:032x}", rand::random::<u128>()).into()
    } else {
        connect.client_id.as_str().into()
    };
    let expiry = connect.session_expiry.min(fabric.limits.session_expiry);
    Ok(Greeting {
        attach: tenant::Connect {
            key: SessionKey {
                identity: identity.clone(),
                name,
            },
            clean_start: connect.clean_start,
            expiry,
            will,
        },
        identity,
        policy,
        assigned_client_id,
        expiry_reduced: expiry < connect.session_expiry,
    })
}

async fn identify(fabric: &Fabric, proof: &Proof, connect: &Connect) -> Result<Identity, Refusal> {
    let passwords = match proof {
        Proof::Known(identity) => return Ok(identity.clone()),
        Proof::Certificate { identity, peer } => {
            return peer.check().map(|()| identity.clone()).map_err(|eviction| {
                fabric.tenant(identity).refused(identity, &eviction.status);
                Refusal::answer(
                    Reason::NOT_AUTHORIZED,
                    eviction.label,
                    eviction.status.message,
                )
            });
        }
        Proof::Missing => {
            return Err(Refusal::answer(
                Reason::NOT_AUTHORIZED,
                "no_certificate",
                "expected a client certificate, found none; this listener takes no passwords",
            ));
        }
        Proof::Password(passwords) => passwords,
    };
    let Some(user) = &connect.user else {
        return Err(Refusal::answer(
            Reason::NOT_AUTHORIZED,
            "no_credentials",
            "expected a client certificate or a user name and password, found neither",
        ));
    };
    let password = connect.password.clone().unwrap_or_default();
    // The answer must not tell an unknown user from a wrong password.
    passwords.verify(user, &password).await.ok_or_else(|| {
        Refusal::answer(
            Reason::BAD_USER_NAME_OR_PASSWORD,
            "password",
            "user name and password do not match",
        )
    })
}

enum WillRefusal {
    Denied(Status),
    Protocol(ProtocolError),
}

fn check_will(will: packet::Will, policy: &IdentityPolicy) -> Result<Will, WillRefusal> {
    let topic = TopicName::parse(will.topic).map_err(|_| {
        WillRefusal::Protocol(ProtocolError::new(
            Reason::TOPIC_NAME_INVALID,
            "an invalid will topic",
        ))
    })?;
    // A request asks for an answer, which nobody would be there to take.
    if exchange::is_reserved(topic.as_str()) {
        let why = format!("a will cannot be published to {topic}: requests are no messages");
        return Err(WillRefusal::Denied(Status::new(
            Code::PermissionDenied,
            why,
        )));
    }
    if let Decision::Denied(denial) = policy.decide(Verb::Publish, &topic) {
        return Err(WillRefusal::Denied(denial.into()));
    }
    let (properties, _) =
        properties::from_publish(will.properties).map_err(WillRefusal::Protocol)?;
    Ok(Will {
        topic,
        payload: will.payload,
        qos: will.qos,
        retain: will.retain,
        delay: will.delay,
        header: properties.encode(),
    })
}

/// How long a client may be silent: one and a half times what it said (MQTT 5.0 section 3.1.2.10).
pub(crate) fn patience(keep_alive: Duration) -> Option<Duration> {
    (!keep_alive.is_zero()).then(|| keep_alive.mul_f32(1.5))
}
