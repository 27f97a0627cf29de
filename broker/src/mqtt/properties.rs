//! Properties of MQTT 5.0 messages to and from those of the fabric.

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use selvedge_proto::message::{Class, Properties};
use selvedge_proto::topic::TopicName;

use crate::mqtt::output::put_binary;
use crate::mqtt::packet::{ProtocolError, PublishProperties};
use crate::mqtt::reason::Reason;

/// User property that names the class of a message: `alarm`, `normal` or `bulk`.
pub(crate) const CLASS_PROPERTY: &str = "selvedge-class";

/// User property that carries the W3C trace context.
const TRACE_PROPERTY: &str = "traceparent";

/// User property that carries one hop; it is repeated, nearest last. The bridge reads it, too.
const HOP_PROPERTY: &str = "selvedge-hop";

/// The fabric's view of a publisher's properties, and the class they ask for.
///
/// # Errors
/// The response topic is no topic name.
pub(crate) fn from_publish(
    properties: PublishProperties,
) -> Result<(Properties, Class), ProtocolError> {
    let response_topic = properties
        .response_topic
        .map(|topic| topic.to_string())
        .unwrap_or_default();
    // MQTT 5.0 section 3.3.2.3.5 forbids wildcards in it.
    if !response_topic.is_empty() && TopicName::parse(&*response_topic).is_err() {
        return Err(ProtocolError::new(
            Reason::PROTOCOL_ERROR,
            "an invalid response topic",
        ));
    }
    let mut class = Class::Normal;
    let mut result = Properties {
        expiry: properties
            .message_expiry_interval
            .map(|seconds| Duration::from_secs(seconds.get().into())),
        content_type: properties
            .content_type
            .map(|content_type| content_type.to_string())
            .unwrap_or_default(),
        response_topic,
        correlation_data: properties.correlation_data.unwrap_or_default(),
        payload_is_utf8: properties.is_utf8_payload,
        ..Properties::default()
    };
    for (name, value) in properties.user_properties {
        match &*name {
            TRACE_PROPERTY if result.traceparent.is_empty() => {
                result.traceparent = value.to_string();
                continue;
            }
            HOP_PROPERTY => {
                result.hops.push(value.to_string());
                continue;
            }
            CLASS_PROPERTY => {
                class = match &*value {
                    "alarm" => Class::Alarm,
                    "bulk" => Class::Bulk,
                    _ => Class::Normal,
                };
            }
            _ => {}
        }
        result.user.push((name.to_string(), value.to_string()));
    }
    Ok((result, class))
}

/// Writes the properties of a PUBLISH, but for its expiry, which the time in the queue has changed.
/// The message id stays behind: it is the fabric's own.
pub(crate) fn put_publish(out: &mut BytesMut, properties: &Properties) {
    if properties.payload_is_utf8 {
        out.put_slice(&[0x01, 1]);
    }
    for (id, value) in [
        (0x03, properties.content_type.as_bytes()),
        (0x08, properties.response_topic.as_bytes()),
        (0x09, &properties.correlation_data),
    ] {
        if !value.is_empty() && fits(value) {
            out.put_u8(id);
            put_binary(out, value);
        }
    }
    let trace = (!properties.traceparent.is_empty())
        .then_some((TRACE_PROPERTY, properties.traceparent.as_str()));
    let hops = properties
        .hops
        .iter()
        .map(|hop| (HOP_PROPERTY, hop.as_str()));
    let user = properties
        .user
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in user.chain(trace).chain(hops) {
        if !fits(name.as_bytes()) || !fits(value.as_bytes()) {
            continue;
        }
        out.put_u8(0x26);
        put_binary(out, name.as_bytes());
        put_binary(out, value.as_bytes());
    }
}

/// Whether MQTT can say it: native clients may send longer properties, which are left out.
fn fits(value: &[u8]) -> bool {
    value.len() <= usize::from(u16::MAX)
}

/// A duration as MQTT says it, rounded up: what is left of a second is not nothing.
pub(crate) fn whole_seconds(duration: Duration) -> u32 {
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    u32::try_from(seconds).unwrap_or(u32::MAX)
}
