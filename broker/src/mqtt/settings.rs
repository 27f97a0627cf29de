//! What an operator may choose of the MQTT protocol itself; the same for every listener.

use std::time::Duration;

use selvedge_certs::Identity;

use crate::mqtt::packet::Version;
use crate::mqtt::reason::Reason;

/// Settings of the protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// QoS 2 messages that a 5.0 client may have sent and not released. Default 1,024.
    pub receive_maximum: u16,
    /// Topic aliases that a client may set, and most that the broker sets towards a client that takes
    /// them. Default 64.
    pub topic_alias_maximum: u16,
    /// Longest keep alive of a 5.0 client; one that asks for more, or for none, is told this. Default:
    /// what the client asks for.
    pub server_keep_alive: Option<Duration>,
    /// What a client that asks for response information is told: the beginning of the topics for its
    /// responses. `{tenant}`, `{site}` and `{name}` stand for those of its identity. Default: nothing.
    pub response_information: Option<String>,
    /// Another broker, for clients to use while this one stops. Default: none.
    pub server_reference: Option<ServerReference>,
    /// What a denied filter is answered with in SUBACK. Default: 0x87, not authorized.
    pub denied_subscription: DeniedSubscription,
    /// How often `$SYS` topics are brought up to date; zero for never. Default 10 s.
    pub sys_interval: Duration,
}

/// Another broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerReference {
    /// Its address as clients are told it, such as `host:port`.
    pub address: String,
    /// Clients should not come back here.
    pub for_good: bool,
}

/// Reason code of a subscription that policy denies, in 5.0; 3.1.1 has only 0x80.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeniedSubscription {
    /// 0x87, not authorized.
    #[default]
    NotAuthorized,
    /// 0x80, unspecified error, for clients that know no other.
    Unspecified,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            receive_maximum: 1024,
            topic_alias_maximum: 64,
            server_keep_alive: None,
            response_information: None,
            server_reference: None,
            denied_subscription: DeniedSubscription::default(),
            sys_interval: Duration::from_secs(10),
        }
    }
}

impl Settings {
    /// The keep alive of a client that asks for `asked`, zero for none.
    pub(crate) fn keep_alive(&self, version: Version, asked: Duration) -> Duration {
        match self.server_keep_alive {
            Some(most) if version == Version::V5 && (asked.is_zero() || asked > most) => most,
            _ => asked,
        }
    }

    /// What a client is told of where its responses go.
    pub(crate) fn response_information(&self, identity: &Identity) -> Option<String> {
        let template = self.response_information.as_ref()?;
        Some(
            template
                .replace("{tenant}", identity.tenant())
                .replace("{site}", identity.site())
                .replace("{name}", identity.name()),
        )
    }

    /// The reason and the other broker for a client that is sent away since this one stops.
    pub(crate) fn redirect(&self, reason: Reason) -> (Reason, Option<&str>) {
        match &self.server_reference {
            Some(other) if reason == Reason::SERVER_SHUTTING_DOWN => {
                let reason = if other.for_good {
                    Reason::SERVER_MOVED
                } else {
                    Reason::USE_ANOTHER_SERVER
                };
                (reason, Some(&other.address))
            }
            _ => (reason, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keep_alive_is_only_shortened_and_only_where_the_client_can_be_told() {
        let seconds = Duration::from_secs;
        let settings = Settings {
            server_keep_alive: Some(seconds(60)),
            ..Settings::default()
        };
        for (version, asked, expected) in [
            (Version::V5, 120, 60),
            (Version::V5, 0, 60),
            (Version::V5, 30, 30),
            (Version::V3, 120, 120),
            (Version::V3, 0, 0),
        ] {
            let kept = settings.keep_alive(version, seconds(asked));
            assert_eq!(kept, seconds(expected), "{version:?} {asked}");
        }
    }
}
