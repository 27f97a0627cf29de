//! Inference vocabulary: tiers, residency, preference and tensors.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use prost::Message as _;

use crate::frame::FrameError;
use crate::wire;

/// A word that is not one of those expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is no {what}: expected {expected}")]
pub struct UnknownWord {
    what: &'static str,
    found: String,
    expected: &'static str,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $what:literal, $expected:literal {
        $($(#[$vdoc:meta])* $variant:ident = $wire:ident, $text:literal;)*
    }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// The word used in configuration and output.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// The number on the wire.
            pub fn to_wire(self) -> i32 {
                match self { $(Self::$variant => wire::$name::$wire as i32,)* }
            }

            /// The value of a number on the wire.
            ///
            /// # Errors
            /// The number is not known.
            pub fn from_wire(number: i32) -> Result<Self, UnknownWord> {
                match number {
                    $(n if n == wire::$name::$wire as i32 => Ok(Self::$variant),)*
                    other => Err(UnknownWord { what: $what, found: other.to_string(), expected: $expected }),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            fn from_str(word: &str) -> Result<Self, UnknownWord> {
                match word {
                    $($text => Ok(Self::$variant),)*
                    other => Err(UnknownWord { what: $what, found: other.to_owned(), expected: $expected }),
                }
            }
        }
    };
}

words! {
    /// Where a worker runs.
    Tier, "tier", "edge or cloud" {
        /// At a site, near the data.
        Edge = Edge, "edge";
        /// In a data centre.
        Cloud = Cloud, "cloud";
    }
}

words! {
    /// How far a request's payload may travel.
    Residency, "residency", "site, tenant or any" {
        /// It stays at the requester's site.
        Site = Site, "site";
        /// It stays within the requester's tenant.
        Tenant = Tenant, "tenant";
        /// No bound.
        Any = Any, "any";
    }
}

words! {
    /// Which worker to favour among those that may answer.
    Preference, "preference", "fastest, edge, cloud or cheapest" {
        /// Least expected completion time.
        Fastest = Fastest, "fastest";
        /// An edge worker while one has room.
        Edge = PreferEdge, "edge";
        /// A cloud worker while one has room.
        Cloud = PreferCloud, "cloud";
        /// Edge counts as cheaper than cloud.
        Cheapest = Cheapest, "cheapest";
    }
}

/// Name, datatype and shape of a model's input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The tensor's name.
    pub name: String,
    /// Datatype name of the Open Inference Protocol v2: `FP32`, `INT64`, …
    pub datatype: String,
    /// Dimensions; -1 for one that may vary.
    pub shape: Vec<i64>,
}

impl From<TensorSpec> for wire::TensorSpec {
    fn from(spec: TensorSpec) -> Self {
        Self {
            name: spec.name,
            datatype: spec.datatype,
            shape: spec.shape,
        }
    }
}

impl From<wire::TensorSpec> for TensorSpec {
    fn from(spec: wire::TensorSpec) -> Self {
        Self {
            name: spec.name,
            datatype: spec.datatype,
            shape: spec.shape,
        }
    }
}

/// A tensor as in the Open Inference Protocol v2, contents raw and little-endian. Whether the
/// contents fit datatype and shape is the model's to check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// The tensor's name.
    pub name: String,
    /// Datatype name of the Open Inference Protocol v2.
    pub datatype: String,
    /// Dimensions.
    pub shape: Vec<i64>,
    /// Contents.
    pub data: Bytes,
}

impl Tensor {
    /// A tensor of 32-bit floats.
    pub fn fp32(name: impl Into<String>, shape: Vec<i64>, values: &[f32]) -> Self {
        Self {
            name: name.into(),
            datatype: "FP32".to_owned(),
            shape,
            data: values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        }
    }

    /// The contents as 32-bit floats, or `None` when the datatype is another or the length is not
    /// a multiple of four.
    pub fn as_fp32(&self) -> Option<Vec<f32>> {
        let (values, rest) = self.data.as_chunks::<4>();
        (self.datatype == "FP32" && rest.is_empty()).then(|| {
            values
                .iter()
                .map(|&value| f32::from_le_bytes(value))
                .collect()
        })
    }
}

/// Encodes tensors as the payload of one data frame.
pub fn encode_tensors(tensors: Vec<Tensor>) -> Bytes {
    let tensors = tensors
        .into_iter()
        .map(|tensor| wire::Tensor {
            name: tensor.name,
            datatype: tensor.datatype,
            shape: tensor.shape,
            data: tensor.data,
        })
        .collect();
    wire::Tensors { tensors }.encode_to_vec().into()
}

/// Reads the payload of a data frame as tensors; contents share its memory.
///
/// # Errors
/// [`FrameError::Malformed`] when it does not decode.
pub fn decode_tensors(payload: Bytes) -> Result<Vec<Tensor>, FrameError> {
    let tensors: wire::Tensors = crate::frame::decode("tensors", payload)?;
    Ok(tensors
        .tensors
        .into_iter()
        .map(|tensor| Tensor {
            name: tensor.name,
            datatype: tensor.datatype,
            shape: tensor.shape,
            data: tensor.data,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_numbers_round_trip() {
        for tier in [Tier::Edge, Tier::Cloud] {
            assert_eq!(tier.as_str().parse(), Ok(tier));
            assert_eq!(Tier::from_wire(tier.to_wire()), Ok(tier));
        }
        assert_eq!(
            "fog".parse::<Tier>().unwrap_err().to_string(),
            r#""fog" is no tier: expected edge or cloud"#
        );
        assert!(Tier::from_wire(0).is_err());
        assert_eq!(Residency::from_wire(0), Ok(Residency::Tenant));
    }

    #[test]
    fn tensors_round_trip() {
        let tensor = Tensor::fp32("input", vec![1, 2], &[1.5, -2.0]);
        let payload = encode_tensors(vec![tensor.clone()]);
        let back = decode_tensors(payload).expect("it was just encoded");
        assert_eq!(back, vec![tensor]);
        assert_eq!(back[0].as_fp32(), Some(vec![1.5, -2.0]));
        assert!(decode_tensors(Bytes::from_static(&[0xff, 1])).is_err());
    }
}
