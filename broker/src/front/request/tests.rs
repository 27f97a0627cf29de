#![allow(clippy::unwrap_used)]

use hyper::header::HeaderName;

use super::*;

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap()))
        .collect()
}

fn refused(pairs: &[(&str, &str)]) -> String {
    Bounds::of_headers(&headers(pairs)).unwrap_err().to_string()
}

#[test]
fn bounds_come_from_headers() {
    let bounds = Bounds::of_headers(&headers(&[
        ("x-selvedge-residency", "site"),
        ("x-selvedge-prefer", "edge"),
        ("x-selvedge-min-confidence", "0.8"),
        ("x-selvedge-idempotent", "true"),
        ("x-selvedge-deadline-ms", "1500"),
        ("x-selvedge-priority", "2"),
        ("x-stainless-read-timeout", "600"),
        ("traceparent", "00-1-2-01"),
        ("accept", "*/*"),
    ]))
    .unwrap();
    assert_eq!(bounds.residency, Some(Residency::Site));
    assert_eq!(bounds.preference, Preference::Edge);
    assert_eq!(bounds.min_confidence, Some(0.8));
    assert!(bounds.idempotent);
    assert_eq!(bounds.deadline, Some(Duration::from_millis(1500)));
    assert_eq!(bounds.traceparent, "00-1-2-01");
    assert_eq!(bounds.parameters, [("priority".to_owned(), "2".to_owned())]);
}

#[test]
fn a_misspelt_or_wrong_bound_is_refused() {
    let misspelt = refused(&[("x-selvedge-residence", "site")]);
    assert!(
        misspelt.starts_with("x-selvedge-residence is not known"),
        "{misspelt}"
    );
    assert_eq!(
        refused(&[("x-selvedge-residency", "here")]),
        r#"x-selvedge-residency: "here" is no residency: expected site, tenant or any"#
    );
    assert_eq!(
        refused(&[("x-selvedge-min-confidence", "2")]),
        r#"x-selvedge-min-confidence: expected a number from 0 to 1, found "2""#
    );
    assert!(refused(&[("x-selvedge-min-confidence", "NaN")]).contains("from 0 to 1"));
    assert!(refused(&[("grpc-timeout", "123456789S")]).starts_with("grpc-timeout"));
    assert!(refused(&[("grpc-timeout", "1s")]).starts_with("grpc-timeout"));
    assert!(refused(&[("grpc-timeout", "+1S")]).starts_with("grpc-timeout"));
}

#[test]
fn the_stricter_of_header_and_parameter_holds() {
    let mut bounds = Bounds::of_headers(&headers(&[
        ("grpc-timeout", "2S"),
        ("x-selvedge-residency", "any"),
        ("x-selvedge-min-confidence", "0.9"),
    ]))
    .unwrap();
    bounds
        .take(vec![
            ("timeout".to_owned(), Parameter::Int(500_000)),
            ("residency".to_owned(), Parameter::Text("site".to_owned())),
            ("min_confidence".to_owned(), Parameter::Double(0.5)),
            ("priority".to_owned(), Parameter::Uint(1)),
            ("temperature".to_owned(), Parameter::Double(0.25)),
        ])
        .unwrap();
    assert_eq!(bounds.deadline, Some(Duration::from_millis(500)));
    assert_eq!(bounds.residency, Some(Residency::Site));
    assert_eq!(bounds.min_confidence, Some(0.9));
    let header = bounds.header("digits", "", "r-1", 7);
    assert_eq!(header.deadline_ms, 500);
    assert_eq!(header.parameters.len(), 2);
    assert_eq!(header.parameters[1].value, "0.25");
    // A residency that came first as parameter is not widened by a later one either.
    assert_eq!(narrower(Residency::Site, Residency::Any), Residency::Site);
    assert_eq!(
        narrower(Residency::Any, Residency::Tenant),
        Residency::Tenant
    );
}

#[test]
fn every_unit_of_grpc_timeout_is_known() {
    for (text, expected) in [
        ("1H", Duration::from_secs(3600)),
        ("2M", Duration::from_secs(120)),
        ("3S", Duration::from_secs(3)),
        ("250m", Duration::from_millis(250)),
        ("7u", Duration::from_micros(7)),
        ("0n", Duration::ZERO),
        ("99999999H", LONGEST),
    ] {
        assert_eq!(grpc_timeout(text), Some(expected), "{text}");
    }
    for text in ["", "S", "é", "1é", "1"] {
        assert_eq!(grpc_timeout(text), None, "{text}");
    }
}

#[test]
fn a_worker_cannot_say_where_it_ran() {
    let answer = wire::InferAnswer {
        worker: "spiffe://example.org/acme/plant-1/edge-1".to_owned(),
        reason: "least expected completion\r\nx: y".to_owned(),
        parameters: to_wire_properties(vec![
            ("worker".to_owned(), "forged".to_owned()),
            ("tokens".to_owned(), "12".to_owned()),
        ]),
        ..wire::InferAnswer::default()
    };
    let parameters = explained(&answer);
    let of = |name: &str| {
        parameters
            .iter()
            .filter(|(n, _)| n == name)
            .collect::<Vec<_>>()
    };
    assert_eq!(of("worker").len(), 1);
    assert_eq!(of("worker")[0].1, Parameter::Text(answer.worker.clone()));
    assert_eq!(of("tokens").len(), 1);
    let mut headers = HeaderMap::new();
    explained_headers(&answer, &mut headers);
    assert_eq!(
        headers["x-selvedge-reason"],
        "least expected completion??x: y"
    );
    assert!(!headers.contains_key("x-selvedge-tokens"));
}
