//! Tests of tensors, signatures and confidence.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn f32_tensor(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_f32(name, shape, values).unwrap()
}

fn zeros(name: &str, datatype: Datatype, shape: &[usize]) -> Tensor {
    let bytes = shape.iter().product::<usize>() * datatype.size();
    Tensor::new(name, datatype, shape, vec![0; bytes]).unwrap()
}

fn signature() -> Signature {
    let spec = |name: &str, datatype, shape| TensorSpec {
        name: name.to_owned(),
        datatype,
        shape,
    };
    let batch = || Dim::Any("N".to_owned());
    Signature {
        inputs: vec![
            spec("image", Datatype::Fp32, vec![batch(), Dim::Fixed(2)]),
            spec("weight", Datatype::Int64, vec![batch()]),
        ],
        outputs: vec![spec("scores", Datatype::Fp32, vec![batch(), Dim::Fixed(3)])],
    }
}

fn names() -> Vec<String> {
    vec!["image".to_owned(), "weight".to_owned()]
}

#[test]
fn every_datatype_has_its_name_back() {
    for datatype in Datatype::ALL {
        assert_eq!(datatype.to_string().parse(), Ok(datatype));
    }
    assert_eq!("BYTES".parse::<Datatype>(), Err(()));
    assert_eq!("fp32".parse::<Datatype>(), Err(()));
}

#[test]
fn a_tensor_survives_the_wire() {
    for datatype in Datatype::ALL {
        for shape in [&[][..], &[3], &[2, 0, 4], &[2, 3]] {
            let tensor = zeros("t", datatype, shape);
            assert_eq!(
                Tensor::try_from(wire::Tensor::from(tensor.clone())),
                Ok(tensor)
            );
        }
    }
    let tensor = f32_tensor("t", &[2], &[1.5, -2.0]);
    assert_eq!(tensor.to_f32(), Some(vec![1.5, -2.0]));
    assert_eq!(zeros("t", Datatype::Int32, &[2]).to_f32(), None);
}

#[test]
fn bytes_that_are_no_tensor_are_refused() {
    let wire = |datatype: &str, shape: &[i64], data: &[u8]| wire::Tensor {
        name: "t".to_owned(),
        datatype: datatype.to_owned(),
        shape: shape.to_vec(),
        data: Bytes::copy_from_slice(data),
    };
    let refusal = |tensor| Tensor::try_from(tensor).unwrap_err();
    let name = || "t".to_owned();

    assert_eq!(
        refusal(wire("BYTES", &[1], b"x")),
        TensorError::Datatype {
            name: name(),
            found: "BYTES".to_owned()
        }
    );
    assert_eq!(
        refusal(wire("FP32", &[2, -1], &[0; 8])),
        TensorError::Dimension {
            name: name(),
            axis: 1,
            found: -1
        }
    );
    assert_eq!(
        refusal(wire("FP32", &[2], &[0; 7])),
        TensorError::Length {
            name: name(),
            expected: 8,
            found: 7
        }
    );
    assert_eq!(
        refusal(wire("FP32", &[0, 5], &[0; 4])),
        TensorError::Length {
            name: name(),
            expected: 0,
            found: 4
        }
    );
    assert_eq!(
        refusal(wire("BOOL", &[3], &[0, 1, 2])),
        TensorError::Bool {
            name: name(),
            offset: 2,
            found: 2
        }
    );
    // The zero makes the product zero, and the data is as long as that.
    assert_eq!(
        refusal(wire("UINT8", &[i64::MAX, 0, i64::MAX], &[])),
        TensorError::TooLarge { name: name() }
    );
}

#[test]
fn inputs_come_in_any_order_and_leave_in_the_signature_s() {
    let image = zeros("image", Datatype::Fp32, &[4, 2]);
    let weight = zeros("weight", Datatype::Int64, &[4]);
    let arranged = signature().arrange(vec![weight.clone(), image.clone()]);
    assert_eq!(arranged, Ok(vec![image, weight]));
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let image = || zeros("image", Datatype::Fp32, &[4, 2]);
    let weight = || zeros("weight", Datatype::Int64, &[4]);
    let refusal = |inputs| signature().arrange(inputs).unwrap_err();
    let name = |name: &str| name.to_owned();

    assert_eq!(
        refusal(vec![image()]),
        InputError::Missing {
            name: name("weight"),
            expected: names()
        }
    );
    assert_eq!(
        refusal(vec![image(), weight(), zeros("x", Datatype::Bool, &[])]),
        InputError::Unknown {
            name: name("x"),
            expected: names()
        }
    );
    assert_eq!(
        refusal(vec![image(), weight(), image()]),
        InputError::Duplicate {
            name: name("image")
        }
    );
    assert_eq!(
        refusal(vec![zeros("image", Datatype::Fp64, &[4, 2]), weight()]),
        InputError::Datatype {
            name: name("image"),
            expected: Datatype::Fp32,
            found: Datatype::Fp64
        }
    );
    assert_eq!(
        refusal(vec![zeros("image", Datatype::Fp32, &[8]), weight()]),
        InputError::Rank {
            name: name("image"),
            expected: 2,
            found: 1
        }
    );
    assert_eq!(
        refusal(vec![zeros("image", Datatype::Fp32, &[4, 3]), weight()]),
        InputError::Dimension {
            name: name("image"),
            axis: 1,
            expected: 2,
            found: 3
        }
    );
    assert_eq!(
        refusal(vec![image(), zeros("weight", Datatype::Int64, &[5])]),
        InputError::Disagreement {
            name: name("weight"),
            axis: 0,
            dimension: name("N"),
            expected: 4,
            found: 5
        }
    );
}

#[test]
fn refusals_say_what_was_expected_and_found() {
    let missing = InputError::Missing {
        name: "weight".to_owned(),
        expected: names(),
    };
    assert_eq!(
        missing.to_string(),
        "input `weight` is missing; the model takes `image`, `weight`"
    );
    let unknown = TensorError::Datatype {
        name: "t".to_owned(),
        found: "BYTES".to_owned(),
    };
    assert!(
        unknown
            .to_string()
            .starts_with("tensor `t` has the datatype `BYTES`; expected one of `BOOL`, `UINT8`")
    );
}

#[test]
fn a_signature_registers_any_dimension_as_minus_one() {
    let spec = wire::TensorSpec::from(&signature().inputs[0]);
    assert_eq!(spec.name, "image");
    assert_eq!(spec.datatype, "FP32");
    assert_eq!(spec.shape, [-1, 2]);
}

#[test]
fn the_confidence_of_a_batch_is_its_most_doubtful_row() {
    let rule = ConfidenceRule::Max {
        output: "p".to_owned(),
    };
    let batch = f32_tensor("p", &[2, 3], &[0.1, 0.8, 0.1, 0.3, 0.3, 0.4]);
    assert_eq!(rule.measure(&[batch]), Ok(Some(0.4)));
    let double: Vec<u8> = [0.25f64, 0.75]
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let double = Tensor::new("p", Datatype::Fp64, [2], double).unwrap();
    assert_eq!(rule.measure(&[double]), Ok(Some(0.75)));
    assert_eq!(rule.measure(&[f32_tensor("p", &[0, 3], &[])]), Ok(None));
    assert_eq!(rule.measure(&[f32_tensor("q", &[1], &[0.5])]), Ok(None));
}

#[test]
fn a_confidence_that_is_no_probability_is_refused() {
    let rule = ConfidenceRule::Max {
        output: "p".to_owned(),
    };
    assert_eq!(
        rule.measure(&[f32_tensor("p", &[2], &[0.5, 3.0])]),
        Err(ModelError::NotAProbability {
            output: "p".to_owned(),
            value: 3.0
        })
    );
    let Err(ModelError::NotAProbability { value, .. }) =
        rule.measure(&[f32_tensor("p", &[2], &[0.5, f32::NAN])])
    else {
        panic!("NaN passed as a probability");
    };
    assert!(value.is_nan());
    // Rounding is no lie.
    let rounded = f32_tensor("p", &[2], &[1.000_000_1, 0.0]);
    assert_eq!(rule.measure(&[rounded]), Ok(Some(1.0)));
}

fn any_datatype() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(Datatype::ALL.to_vec()).prop_map(|datatype| datatype.to_string()),
        ".{0,8}",
    ]
}

proptest! {
    #[test]
    fn any_bytes_make_a_tensor_or_an_error(
        name in ".{0,8}",
        datatype in any_datatype(),
        shape in prop::collection::vec(prop_oneof![0i64..4, any::<i64>()], 0..5),
        data in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let wire = wire::Tensor { name, datatype, shape, data: data.into() };
        if let Ok(tensor) = Tensor::try_from(wire.clone()) {
            let elements: usize = tensor.shape().iter().product();
            prop_assert_eq!(tensor.data().len(), elements * tensor.datatype().size());
            prop_assert_eq!(wire::Tensor::from(tensor), wire);
        }
    }

    #[test]
    fn data_of_the_right_length_is_taken(
        datatype in prop::sample::select(Datatype::ALL.to_vec()),
        shape in prop::collection::vec(0usize..4, 0..4),
    ) {
        let tensor = zeros("t", datatype, &shape);
        prop_assert_eq!(tensor.shape(), &shape[..]);
    }

    #[test]
    fn a_confidence_is_a_probability(
        rows in 1usize..4,
        values in prop::collection::vec(0f32..=1.0, 12),
    ) {
        let values = &values[..rows * 3];
        let rule = ConfidenceRule::Max { output: "p".to_owned() };
        let confidence = rule.measure(&[f32_tensor("p", &[rows, 3], values)]).unwrap().unwrap();
        let least = values
            .chunks(3)
            .map(|row| row.iter().copied().fold(0.0, f32::max))
            .fold(1.0, f32::min);
        prop_assert_eq!(confidence, least);
    }
}
