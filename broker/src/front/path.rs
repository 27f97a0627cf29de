//! Which request an HTTP path of the front door asks for.

#[cfg(test)]
mod tests;

/// What a path asks for. Names of models may have slashes, as topics have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    /// `GET /v2/health/live`
    Live,
    /// `GET /v2/health/ready`
    Ready,
    /// `GET /v2`
    Server,
    /// `GET` or `POST /v2/repository/index`
    Index,
    /// Something of a model.
    Model {
        /// The model.
        model: String,
        /// Its version; empty for any.
        version: String,
        /// What of it.
        what: OfModel,
    },
    /// `GET /v1/models`
    List,
    /// `GET /v1/models/{model}`
    Listed(String),
    /// `POST /v1/…`: an operation of the OpenAI API.
    Operation(Operation),
}

/// What is asked of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OfModel {
    /// Name, versions, inputs and outputs.
    Metadata,
    /// Whether it is ready.
    Ready,
    /// Triton's configuration.
    Config,
    /// An inference.
    Infer,
}

/// An operation of the OpenAI API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/embeddings`
    Embeddings,
}

impl Operation {
    /// Its name in requests to workers and in what models say they take.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat.completions",
            Self::Completions => "completions",
            Self::Embeddings => "embeddings",
        }
    }
}

/// Reads a path, without its query.
pub(crate) fn route(path: &str) -> Option<Route> {
    let path = path.strip_suffix('/').unwrap_or(path);
    match path {
        "/v2" => return Some(Route::Server),
        "/v2/health/live" => return Some(Route::Live),
        "/v2/health/ready" => return Some(Route::Ready),
        "/v2/repository/index" => return Some(Route::Index),
        "/v1/models" => return Some(Route::List),
        "/v1/chat/completions" => return Some(Route::Operation(Operation::Chat)),
        "/v1/completions" => return Some(Route::Operation(Operation::Completions)),
        "/v1/embeddings" => return Some(Route::Operation(Operation::Embeddings)),
        _ => {}
    }
    if let Some(model) = path.strip_prefix("/v1/models/") {
        return Some(Route::Listed(decoded(model)?));
    }
    let path = path.strip_prefix("/v2/models/")?;
    let ends = [
        ("/ready", OfModel::Ready),
        ("/config", OfModel::Config),
        ("/infer", OfModel::Infer),
    ];
    let (path, what) = ends
        .into_iter()
        .find_map(|(end, what)| Some((path.strip_suffix(end)?, what)))
        .unwrap_or((path, OfModel::Metadata));
    let (model, version) = match path.rsplit_once("/versions/") {
        Some((model, version)) if !version.contains('/') => (model, version),
        _ => (path, ""),
    };
    if model.is_empty() {
        return None;
    }
    Some(Route::Model {
        model: decoded(model)?,
        version: decoded(version)?,
        what,
    })
}

/// Undoes percent-encoding; `None` when it is malformed or not UTF-8.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first == b'%' {
            let (digits, after) = after.split_first_chunk::<2>()?;
            let digit = |byte: u8| char::from(byte).to_digit(16);
            let value = digit(digits[0])? * 16 + digit(digits[1])?;
            bytes.push(u8::try_from(value).ok()?);
            rest = after;
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}
