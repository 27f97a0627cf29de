//! Elements of tensors as the Open Inference Protocol has them: their sizes, and the contents of its
//! messages as bytes.

use bytes::{BufMut, Bytes, BytesMut};

use crate::open_inference as oip;

/// Why elements cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ElementError {
    /// The datatype is not one of the protocol.
    #[error(
        "datatype {0:?} is not known: expected BOOL, UINT8 to UINT64, INT8 to INT64, FP16, BF16, \
         FP32, FP64 or BYTES"
    )]
    Datatype(String),
    /// An element of BYTES ends before its length says so.
    #[error("an element of BYTES is cut off")]
    CutOff,
    /// An element of BYTES is longer than its length can say.
    #[error("an element of BYTES has 4 GiB or more")]
    TooLong,
    /// A number does not fit the datatype.
    #[error("{value} is out of range for {datatype}")]
    Range {
        /// The number.
        value: i64,
        /// The datatype.
        datatype: String,
    },
    /// The datatype only travels raw.
    #[error("{0} has no contents: send it raw")]
    OnlyRaw(String),
}

/// Bytes of one element, or `None` for BYTES, whose elements have a length each.
///
/// # Errors
/// The datatype is not one of the protocol.
pub fn element_size(datatype: &str) -> Result<Option<usize>, ElementError> {
    Ok(Some(match datatype {
        "BOOL" | "UINT8" | "INT8" => 1,
        "UINT16" | "INT16" | "FP16" | "BF16" => 2,
        "UINT32" | "INT32" | "FP32" => 4,
        "UINT64" | "INT64" | "FP64" => 8,
        "BYTES" => return Ok(None),
        other => return Err(ElementError::Datatype(other.to_owned())),
    }))
}

/// The elements of a BYTES tensor: a length of four bytes, little-endian, before each.
#[derive(Debug, Clone)]
pub struct BytesElements<'a>(pub &'a [u8]);

impl<'a> Iterator for BytesElements<'a> {
    type Item = Result<&'a [u8], ElementError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let cut = self.0.split_first_chunk::<4>().and_then(|(length, rest)| {
            let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
            rest.split_at_checked(length)
        });
        match cut {
            Some((element, rest)) => {
                self.0 = rest;
                Some(Ok(element))
            }
            None => {
                self.0 = &[];
                Some(Err(ElementError::CutOff))
            }
        }
    }
}

/// Appends one element of a BYTES tensor.
///
/// # Errors
/// It is too long.
pub fn put_bytes_element(buffer: &mut BytesMut, element: &[u8]) -> Result<(), ElementError> {
    let length = u32::try_from(element.len()).map_err(|_| ElementError::TooLong)?;
    buffer.put_u32_le(length);
    buffer.put_slice(element);
    Ok(())
}

/// Little-endian bytes of elements that came in the field for their datatype.
///
/// # Errors
/// One does not fit the datatype, or the datatype has no such field.
pub fn from_contents(
    datatype: &str,
    contents: oip::InferTensorContents,
) -> Result<Bytes, ElementError> {
    fn small<T: Copy + Into<i64>, U: TryFrom<T>, const N: usize>(
        datatype: &str,
        values: &[T],
        bytes: impl Fn(U) -> [u8; N],
    ) -> Result<Bytes, ElementError> {
        let mut data = BytesMut::with_capacity(values.len() * N);
        for &value in values {
            let value = U::try_from(value).map_err(|_| ElementError::Range {
                value: value.into(),
                datatype: datatype.to_owned(),
            })?;
            data.put_slice(&bytes(value));
        }
        Ok(data.freeze())
    }
    fn whole<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Bytes {
        values.iter().flat_map(|&value| bytes(value)).collect()
    }
    let c = contents;
    Ok(match datatype {
        "BOOL" => whole(&c.bool_contents, |value| [u8::from(value)]),
        "INT8" => small(datatype, &c.int_contents, i8::to_le_bytes)?,
        "INT16" => small(datatype, &c.int_contents, i16::to_le_bytes)?,
        "INT32" => whole(&c.int_contents, i32::to_le_bytes),
        "INT64" => whole(&c.int64_contents, i64::to_le_bytes),
        "UINT8" => small(datatype, &c.uint_contents, u8::to_le_bytes)?,
        "UINT16" => small(datatype, &c.uint_contents, u16::to_le_bytes)?,
        "UINT32" => whole(&c.uint_contents, u32::to_le_bytes),
        "UINT64" => whole(&c.uint64_contents, u64::to_le_bytes),
        "FP32" => whole(&c.fp32_contents, f32::to_le_bytes),
        "FP64" => whole(&c.fp64_contents, f64::to_le_bytes),
        "BYTES" => {
            let mut data = BytesMut::new();
            for element in &c.bytes_contents {
                put_bytes_element(&mut data, element)?;
            }
            data.freeze()
        }
        other => {
            element_size(other)?;
            return Err(ElementError::OnlyRaw(other.to_owned()));
        }
    })
}
