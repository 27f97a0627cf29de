//! Existing MQTT brokers to and from the fabric: a pure topic mapping over rumqttc and the client.

pub mod mapping;
