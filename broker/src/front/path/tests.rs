use proptest::prelude::*;

use super::*;

fn model(model: &str, version: &str, what: OfModel) -> Option<Route> {
    Some(Route::Model {
        model: model.to_owned(),
        version: version.to_owned(),
        what,
    })
}

#[test]
fn every_path_that_clients_use_is_known() {
    for (path, expected) in [
        ("/v2", Some(Route::Server)),
        ("/v2/", Some(Route::Server)),
        ("/v2/health/live", Some(Route::Live)),
        ("/v2/health/ready", Some(Route::Ready)),
        ("/v2/repository/index", Some(Route::Index)),
        ("/v2/models/digits", model("digits", "", OfModel::Metadata)),
        (
            "/v2/models/digits/ready",
            model("digits", "", OfModel::Ready),
        ),
        (
            "/v2/models/digits/infer",
            model("digits", "", OfModel::Infer),
        ),
        (
            "/v2/models/digits/config",
            model("digits", "", OfModel::Config),
        ),
        (
            "/v2/models/digits/versions/2",
            model("digits", "2", OfModel::Metadata),
        ),
        (
            "/v2/models/digits/versions/2/infer",
            model("digits", "2", OfModel::Infer),
        ),
        ("/v2/models/a/b/infer", model("a/b", "", OfModel::Infer)),
        (
            "/v2/models/a%2Fb%20c/ready",
            model("a/b c", "", OfModel::Ready),
        ),
        ("/v1/models", Some(Route::List)),
        ("/v1/models/a/b", Some(Route::Listed("a/b".to_owned()))),
        (
            "/v1/chat/completions",
            Some(Route::Operation(Operation::Chat)),
        ),
        (
            "/v1/completions",
            Some(Route::Operation(Operation::Completions)),
        ),
        (
            "/v1/embeddings",
            Some(Route::Operation(Operation::Embeddings)),
        ),
        ("/", None),
        ("", None),
        ("/v2/models", None),
        ("/v2/models//infer", None),
        ("/v2/models/%zz/infer", None),
        ("/v2/models/%ff/infer", None),
        ("/v2/models/%e/infer", None),
        ("/metrics", None),
    ] {
        assert_eq!(route(path), expected, "{path}");
    }
}

proptest! {
    #[test]
    fn any_model_and_version_are_found_in_a_path_that_names_them(
        name in "[a-zé ]{1,8}(/[a-z]{1,4}){0,2}",
        version in "[0-9a-z]{1,4}",
    ) {
        let encoded: String = name.bytes().map(|byte| match byte {
            b'/' => "/".to_owned(),
            byte => format!("%{byte:02x}"),
        }).collect();
        let path = format!("/v2/models/{encoded}/versions/{version}/infer");
        prop_assert_eq!(route(&path), model(&name, &version, OfModel::Infer));
    }

    #[test]
    fn no_path_panics(path in "(/v[12]/models)?[ -~é%/]{0,40}") {
        let _ = route(&path);
    }
}
