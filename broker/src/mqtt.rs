//! MQTT 3.1.1 and 5.0 on the same sessions, router and policy as native clients.

pub mod password;
