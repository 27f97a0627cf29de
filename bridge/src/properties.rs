//! MQTT 5 properties to and from the fabric's, and the hop list that makes loops impossible.

use std::time::Duration;

use bytes::Bytes;
use rumqttc::v5::mqttbytes::v5::PublishProperties;
use selvedge_proto::message::Properties;

/// User property that carries one hop; it is repeated, nearest last.
pub const HOP_PROPERTY: &str = "selvedge-hop";

/// User property that carries the W3C trace context.
pub const TRACE_PROPERTY: &str = "traceparent";

/// A message that has passed this many brokers and bridges is carried no further.
pub const MAX_HOPS: usize = 16;

/// Why a message's hop list forbids carrying it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HopRefusal {
    /// It has been here before.
    Loop,
    /// It has passed [`MAX_HOPS`] already.
    TooMany,
}

/// Adds `own` to the hop list, or says why the message must stop here.
pub(crate) fn add_hop(hops: &mut Vec<String>, own: &str) -> Result<(), HopRefusal> {
    if hops.iter().any(|hop| hop == own) {
        return Err(HopRefusal::Loop);
    }
    if hops.len() >= MAX_HOPS {
        return Err(HopRefusal::TooMany);
    }
    hops.push(own.to_owned());
    Ok(())
}

/// What a remote said, as the fabric says it.
pub(crate) fn from_remote(properties: PublishProperties) -> Properties {
    let mut result = Properties {
        expiry: properties
            .message_expiry_interval
            .map(|seconds| Duration::from_secs(seconds.into())),
        content_type: properties.content_type.unwrap_or_default(),
        response_topic: properties.response_topic.unwrap_or_default(),
        correlation_data: properties.correlation_data.unwrap_or_default(),
        payload_is_utf8: properties.payload_format_indicator == Some(1),
        ..Properties::default()
    };
    for (name, value) in properties.user_properties {
        match &*name {
            HOP_PROPERTY => result.hops.push(value),
            TRACE_PROPERTY if result.traceparent.is_empty() => result.traceparent = value,
            _ => result.user.push((name, value)),
        }
    }
    result
}

/// What the fabric said, as an MQTT 5 remote reads it. The message id stays behind: it is the
/// fabric's own.
pub(crate) fn to_remote(properties: &Properties) -> PublishProperties {
    let given = |text: &String| (!text.is_empty()).then(|| text.clone());
    let bytes = |data: &Bytes| (!data.is_empty()).then(|| data.clone());
    let mut user = properties.user.clone();
    if let Some(trace) = given(&properties.traceparent) {
        user.push((TRACE_PROPERTY.to_owned(), trace));
    }
    let hops = properties.hops.iter().cloned();
    user.extend(hops.map(|hop| (HOP_PROPERTY.to_owned(), hop)));
    PublishProperties {
        payload_format_indicator: properties.payload_is_utf8.then_some(1),
        message_expiry_interval: properties.expiry.map(whole_seconds),
        topic_alias: None,
        response_topic: given(&properties.response_topic),
        correlation_data: bytes(&properties.correlation_data),
        user_properties: user,
        subscription_identifiers: Vec::new(),
        content_type: given(&properties.content_type),
    }
}

/// Rounded up, so that a message with half a second left is not dead on arrival.
fn whole_seconds(expiry: Duration) -> u32 {
    let begun = u64::from(expiry.subsec_nanos() > 0);
    let rounded = expiry.as_secs().saturating_add(begun);
    u32::try_from(rounded).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text() -> impl Strategy<Value = String> {
        "[a-z/]{0,5}"
    }

    fn properties() -> impl Strategy<Value = Properties> {
        let user = proptest::collection::vec((text(), text()), 0..4);
        let hops = proptest::collection::vec(text(), 0..4);
        let seconds = proptest::option::of(any::<u32>());
        (
            text(),
            text(),
            text(),
            seconds,
            user,
            text(),
            any::<bool>(),
            hops,
        )
            .prop_map(
                |(content, response, correlation, seconds, user, trace, utf8, hops)| Properties {
                    message_id: Bytes::new(),
                    expiry: seconds.map(|seconds| Duration::from_secs(seconds.into())),
                    content_type: content,
                    response_topic: response,
                    correlation_data: Bytes::from(correlation),
                    user,
                    traceparent: trace,
                    payload_is_utf8: utf8,
                    hops,
                    // Of replays only, which are not bridged.
                    published: None,
                },
            )
    }

    proptest! {
        #[test]
        fn properties_survive_the_way_there_and_back(properties in properties()) {
            prop_assert_eq!(from_remote(to_remote(&properties)), properties);
        }
    }

    #[test]
    fn a_rest_of_a_second_is_rounded_up() {
        assert_eq!(whole_seconds(Duration::from_millis(1)), 1);
        assert_eq!(whole_seconds(Duration::from_secs(2)), 2);
        assert_eq!(whole_seconds(Duration::MAX), u32::MAX);
    }

    #[test]
    fn hops_stop_loops_and_endless_chains() {
        let mut hops = vec!["a".to_owned()];
        assert_eq!(add_hop(&mut hops, "b"), Ok(()));
        assert_eq!(hops, ["a", "b"]);
        assert_eq!(add_hop(&mut hops, "a"), Err(HopRefusal::Loop));
        let mut hops: Vec<String> = (0..MAX_HOPS - 1).map(|hop| hop.to_string()).collect();
        assert_eq!(add_hop(&mut hops, "last"), Ok(()));
        assert_eq!(add_hop(&mut hops, "one more"), Err(HopRefusal::TooMany));
        assert_eq!(hops.len(), MAX_HOPS);
    }
}
