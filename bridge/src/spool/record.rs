//! A message as the journal keeps it.

use std::time::{Duration, Instant, SystemTime};

use bytes::{Buf as _, BufMut as _, Bytes};
use selvedge_proto::message::{Durability, Properties, Qos};

use crate::forward::Packet;

/// The only layout there is.
const LAYOUT: u8 = 1;

/// A message that is taken and not handed over yet, in the words of the side it goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    /// Place of its rule in the configuration, for figures.
    pub(crate) rule: usize,
    /// When the bridge took it.
    pub(crate) taken: SystemTime,
    /// When its lifetime ends.
    pub(crate) expires: Option<SystemTime>,
    /// What the fabric must have done with it before it is settled.
    pub(crate) durability: Durability,
    /// What makes it the same message when it comes again; empty for what may come twice.
    pub(crate) name: Bytes,
    pub(crate) packet: Packet,
}

/// Why a record is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Damaged {
    #[error("expected layout {LAYOUT}, found {0}")]
    Layout(u8),
    #[error("expected {0}, found the end of the record")]
    Short(&'static str),
    #[error("expected {0}, found something else")]
    Wrong(&'static str),
}

impl Stored {
    /// What it counts for in its queue's budget.
    pub(crate) fn bytes(&self) -> usize {
        self.packet.bytes() + self.name.len()
    }

    /// The same end of its lifetime on the other clock.
    pub(crate) fn expires_at(&self) -> Option<Instant> {
        let left = self
            .expires?
            .duration_since(SystemTime::now())
            .unwrap_or_default();
        Instant::now().checked_add(left)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let packet = &self.packet;
        let header = packet.properties.encode().unwrap_or_default();
        let fields = [&self.name, &packet.topic, &header, &packet.payload];
        let length: usize = fields.iter().map(|field| field.len()).sum();
        let mut record = Vec::with_capacity(length + 40);
        record.put_u8(LAYOUT);
        record.put_u8(packet.qos as u8);
        record.put_u8(packet.retain.into());
        record.put_u8(match self.durability {
            Durability::Default => 0,
            Durability::Memory => 1,
            Durability::Disk => 2,
            Durability::Replicated => 3,
        });
        record.put_u32(u32::try_from(self.rule).unwrap_or(u32::MAX));
        record.put_u64(millis(self.taken));
        record.put_u64(self.expires.map_or(0, millis));
        for field in fields {
            // A packet has at most 256 MiB.
            record.put_u32(u32::try_from(field.len()).unwrap_or(u32::MAX));
            record.put_slice(field);
        }
        record
    }

    pub(crate) fn decode(record: &[u8]) -> Result<Self, Damaged> {
        let mut rest = record;
        let short = |what| move |_| Damaged::Short(what);
        let layout = rest.try_get_u8().map_err(short("a layout"))?;
        if layout != LAYOUT {
            return Err(Damaged::Layout(layout));
        }
        let qos = rest.try_get_u8().map_err(short("a quality of service"))?;
        let qos = Qos::try_from(qos).map_err(|_| Damaged::Wrong("a quality of service"))?;
        let retain = rest.try_get_u8().map_err(short("a retain flag"))? != 0;
        let durability = match rest.try_get_u8().map_err(short("a durability"))? {
            0 => Durability::Default,
            1 => Durability::Memory,
            2 => Durability::Disk,
            3 => Durability::Replicated,
            _ => return Err(Damaged::Wrong("a durability")),
        };
        let rule = rest.try_get_u32().map_err(short("a rule"))?;
        let taken = time(rest.try_get_u64().map_err(short("a time"))?)?;
        let expires = match rest.try_get_u64().map_err(short("a time"))? {
            0 => None,
            ms => Some(time(ms)?),
        };
        let mut field = |what| {
            let length = rest.try_get_u32().map_err(short(what))?;
            let length = usize::try_from(length).map_err(|_| Damaged::Short(what))?;
            let (field, after) = rest.split_at_checked(length).ok_or(Damaged::Short(what))?;
            rest = after;
            Ok(Bytes::copy_from_slice(field))
        };
        let name = field("a name")?;
        let topic = field("a topic")?;
        let header = field("properties")?;
        let payload = field("a payload")?;
        let properties = Properties::decode(&header).map_err(|_| Damaged::Wrong("properties"))?;
        Ok(Self {
            rule: usize::try_from(rule).unwrap_or(usize::MAX),
            taken,
            expires,
            durability,
            name,
            packet: Packet {
                topic,
                payload,
                qos,
                retain,
                properties,
            },
        })
    }
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

fn time(ms: u64) -> Result<SystemTime, Damaged> {
    let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms));
    time.ok_or(Damaged::Wrong("a time"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn bytes() -> impl Strategy<Value = Bytes> {
        proptest::collection::vec(any::<u8>(), 0..20).prop_map(Bytes::from)
    }

    prop_compose! {
        fn stored()(
            (rule, taken, expires) in (0..9_usize, 0..1_u64 << 40, 0..1_u64 << 40),
            (name, topic, payload) in (bytes(), bytes(), bytes()),
            (qos, retain, disk) in (0..3_u8, any::<bool>(), any::<bool>()),
            (hop, expiry) in ("[a-z]{0,3}", proptest::option::of(1..100_u64)),
        ) -> Stored {
            Stored {
                rule,
                taken: time(taken).unwrap(),
                expires: (expires > 0).then(|| time(expires).unwrap()),
                durability: if disk { Durability::Disk } else { Durability::Default },
                name,
                packet: Packet {
                    topic,
                    payload,
                    qos: Qos::try_from(qos).unwrap(),
                    retain,
                    properties: Properties {
                        hops: vec![hop],
                        expiry: expiry.map(Duration::from_secs),
                        ..Properties::default()
                    },
                },
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(stored in stored()) {
            prop_assert_eq!(Stored::decode(&stored.encode()), Ok(stored));
        }

        #[test]
        fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut bytes = bytes;
            let _any = Stored::decode(&bytes);
            if let Some(first) = bytes.first_mut() {
                *first = LAYOUT;
            }
            let _any = Stored::decode(&bytes);
        }

        #[test]
        fn a_record_cut_short_is_none(stored in stored(), keep in 0.0..1.0_f64) {
            let record = stored.encode();
            let keep = (record.len() as f64 * keep) as usize;
            prop_assert!(Stored::decode(&record[..keep]).is_err());
        }
    }
}
