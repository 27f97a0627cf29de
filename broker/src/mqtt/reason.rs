//! Reason codes of MQTT 5.0, what they are in 3.1.1, and what a status of the fabric is in both.

use selvedge_proto::status::{Code, Status};

/// A reason code (MQTT 5.0 section 2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reason(pub(crate) u8);

impl Reason {
    pub(crate) const SUCCESS: Self = Self(0x00);
    pub(crate) const NO_SUBSCRIPTION_EXISTED: Self = Self(0x11);
    pub(crate) const UNSPECIFIED: Self = Self(0x80);
    pub(crate) const MALFORMED_PACKET: Self = Self(0x81);
    pub(crate) const PROTOCOL_ERROR: Self = Self(0x82);
    pub(crate) const UNSUPPORTED_VERSION: Self = Self(0x84);
    pub(crate) const CLIENT_ID_NOT_VALID: Self = Self(0x85);
    pub(crate) const BAD_USER_NAME_OR_PASSWORD: Self = Self(0x86);
    pub(crate) const NOT_AUTHORIZED: Self = Self(0x87);
    pub(crate) const SERVER_BUSY: Self = Self(0x89);
    pub(crate) const SERVER_SHUTTING_DOWN: Self = Self(0x8B);
    pub(crate) const BAD_AUTHENTICATION_METHOD: Self = Self(0x8C);
    pub(crate) const KEEP_ALIVE_TIMEOUT: Self = Self(0x8D);
    pub(crate) const SESSION_TAKEN_OVER: Self = Self(0x8E);
    pub(crate) const TOPIC_FILTER_INVALID: Self = Self(0x8F);
    pub(crate) const TOPIC_NAME_INVALID: Self = Self(0x90);
    pub(crate) const PACKET_ID_NOT_FOUND: Self = Self(0x92);
    pub(crate) const RECEIVE_MAXIMUM_EXCEEDED: Self = Self(0x93);
    pub(crate) const TOPIC_ALIAS_INVALID: Self = Self(0x94);
    pub(crate) const PACKET_TOO_LARGE: Self = Self(0x95);
    pub(crate) const QUOTA_EXCEEDED: Self = Self(0x97);
    pub(crate) const USE_ANOTHER_SERVER: Self = Self(0x9C);
    pub(crate) const SERVER_MOVED: Self = Self(0x9D);

    /// Whether it says that something went wrong.
    pub(crate) fn is_failure(self) -> bool {
        self.0 >= 0x80
    }

    /// For one refused request: a PUBLISH or one filter of a SUBSCRIBE.
    pub(crate) fn of_refusal(status: &Status) -> Self {
        match status.code {
            Code::PermissionDenied | Code::Unauthenticated => Self::NOT_AUTHORIZED,
            Code::ResourceExhausted => Self::QUOTA_EXCEEDED,
            _ => Self::UNSPECIFIED,
        }
    }

    /// For the DISCONNECT of a connection that is ended from outside.
    pub(crate) fn of_kick(status: &Status) -> Self {
        match status.code {
            Code::Aborted => Self::SESSION_TAKEN_OVER,
            Code::Unavailable => Self::SERVER_SHUTTING_DOWN,
            _ => Self::of_refusal(status),
        }
    }

    /// The return code of a 3.1.1 CONNACK. `None` when the standard has none and wants the
    /// connection closed without one.
    pub(crate) fn connack_v3(self) -> Option<u8> {
        Some(match self {
            Self::SUCCESS => 0,
            Self::UNSUPPORTED_VERSION => 1,
            Self::CLIENT_ID_NOT_VALID => 2,
            Self::SERVER_BUSY
            | Self::SERVER_SHUTTING_DOWN
            | Self::USE_ANOTHER_SERVER
            | Self::SERVER_MOVED
            | Self::QUOTA_EXCEEDED => 3,
            Self::BAD_USER_NAME_OR_PASSWORD => 4,
            Self::NOT_AUTHORIZED => 5,
            _ => return None,
        })
    }
}
