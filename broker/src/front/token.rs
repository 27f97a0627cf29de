//! Bearer tokens of the front door: who holds one is an identity. The file has their hashes only.
//!
//! A token has 256 random bits, so a plain SHA-256 of it cannot be turned back or guessed, and checking
//! one costs microseconds with each request. Passwords, which people choose, need the slow hash that
//! the MQTT listener uses.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};
use selvedge_certs::Identity;
use serde::{Deserialize, Serialize};

use crate::mqtt::password::replace;

#[cfg(test)]
mod tests;

/// What tokens begin with, so that people and scanners for leaked secrets know them.
const PREFIX: &str = "svt_";

/// What hashes in the file begin with.
const ALGORITHM: &str = "sha256:";

/// Bytes of the part that finds a token in the file.
const ID: usize = 8;

/// Bytes of the part that proves it.
const SECRET: usize = 32;

/// Longest name of a token, in bytes.
const MAX_NAME: usize = 128;

/// The tokens of one file. Cheap to clone.
#[derive(Clone)]
pub struct Tokens(Arc<HashMap<String, Token>>);

#[derive(Debug)]
struct Token {
    hash: [u8; 32],
    identity: Identity,
}

/// A token as people see it: everything but the secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Name, unique in its file.
    pub name: String,
    /// Whoever holds it is this identity.
    pub identity: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    token: Vec<FileToken>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileToken {
    name: String,
    id: String,
    hash: String,
    identity: String,
}

/// Why a file of tokens cannot be used or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokensError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no list of tokens.
    #[error("{path}: expected tables [[token]] with name, id, hash and identity: {problem}")]
    Syntax {
        /// The file.
        path: String,
        /// Where and what, without the line itself.
        problem: String,
    },
    /// Some tokens are wrong.
    #[error("{path}: {}", .problems.join("; "))]
    Tokens {
        /// The file.
        path: String,
        /// Everything that is wrong.
        problems: Vec<String>,
    },
    /// A token of this name is not there.
    #[error("{path}: expected a token named {name:?}, found none")]
    NotFound {
        /// The file.
        path: String,
        /// The name.
        name: String,
    },
    /// The system gives no random bytes.
    #[error("the system gives no random bytes")]
    Random,
}

impl Tokens {
    /// Reads a file of tokens.
    ///
    /// # Errors
    /// It cannot be read, or some of it is no token; every problem is named.
    pub fn load(path: &Path) -> Result<Self, TokensError> {
        let file = read(path)?;
        let mut problems = Vec::new();
        let mut tokens = HashMap::new();
        let mut names = std::collections::HashSet::new();
        for token in file.token {
            let named = format!("token {:?}", token.name);
            if !names.insert(token.name.clone()) {
                problems.push(format!("{named} is there twice"));
            }
            match check(&token) {
                Ok(checked) => {
                    if tokens.insert(token.id, checked).is_some() {
                        problems.push(format!("{named} has the id of another"));
                    }
                }
                Err(problem) => problems.push(format!("{named}: {problem}")),
            }
        }
        if problems.is_empty() {
            Ok(Self(Arc::new(tokens)))
        } else {
            Err(TokensError::Tokens {
                path: path.display().to_string(),
                problems,
            })
        }
    }

    /// The identity of whoever holds this token; `None` does not tell a wrong token from an unknown one.
    pub fn verify(&self, token: &str) -> Option<Identity> {
        let (id, _) = parts(token)?;
        let held = self.0.get(id)?;
        let hash = digest(&SHA256, token.as_bytes());
        verify_slices_are_equal(hash.as_ref(), &held.hash).ok()?;
        Some(held.identity.clone())
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(self.0.values().map(|token| token.identity.uri()))
            .finish()
    }
}

/// Makes a token for an identity and adds it to a file, in place of one of the same name. Returns the
/// token, which is nowhere else. The file comes into being if there is none; it changes as a whole or
/// not at all, and only its owner may read it. Comments in it are lost.
///
/// # Errors
/// The file cannot be read or written, is no file of tokens, or the name is not usable.
pub fn create(path: &Path, name: &str, identity: &Identity) -> Result<String, TokensError> {
    let mut file = match read(path) {
        Err(TokensError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            File::default()
        }
        other => other?,
    };
    let mut bytes = [0; ID + SECRET];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| TokensError::Random)?;
    let (id, secret) = bytes.split_at(ID);
    let id = hex(id);
    let token = format!("{PREFIX}{id}_{}", hex(secret));
    let entry = FileToken {
        name: name.to_owned(),
        id,
        hash: format!(
            "{ALGORITHM}{}",
            hex(digest(&SHA256, token.as_bytes()).as_ref())
        ),
        identity: identity.uri().to_owned(),
    };
    check(&entry).map_err(|problem| TokensError::Tokens {
        path: path.display().to_string(),
        problems: vec![problem],
    })?;
    file.token.retain(|held| held.name != name);
    file.token.push(entry);
    write(path, &file)?;
    Ok(token)
}

/// Takes the token of this name out of a file.
///
/// # Errors
/// There is none, or the file cannot be read or written.
pub fn remove(path: &Path, name: &str) -> Result<(), TokensError> {
    let mut file = read(path)?;
    let before = file.token.len();
    file.token.retain(|held| held.name != name);
    if file.token.len() == before {
        return Err(TokensError::NotFound {
            path: path.display().to_string(),
            name: name.to_owned(),
        });
    }
    write(path, &file)
}

/// The tokens of a file, for people.
///
/// # Errors
/// The file cannot be read.
pub fn list(path: &Path) -> Result<Vec<Listed>, TokensError> {
    let tokens = read(path)?.token.into_iter();
    Ok(tokens
        .map(|token| Listed {
            name: token.name,
            identity: token.identity,
        })
        .collect())
}

fn read(path: &Path) -> Result<File, TokensError> {
    let text = std::fs::read_to_string(path).map_err(|source| TokensError::Read {
        path: path.display().to_string(),
        source,
    })?;
    toml::from_str(&text).map_err(|error| TokensError::Syntax {
        path: path.display().to_string(),
        problem: error.message().to_owned(),
    })
}

fn write(path: &Path, file: &File) -> Result<(), TokensError> {
    let text = toml::to_string(file).map_err(|error| TokensError::Syntax {
        path: path.display().to_string(),
        problem: error.to_string(),
    })?;
    replace(path, text.as_bytes()).map_err(|source| TokensError::Write {
        path: path.display().to_string(),
        source,
    })
}

fn check(token: &FileToken) -> Result<Token, String> {
    if token.name.is_empty() || token.name.len() > MAX_NAME {
        return Err(format!("expected a name of 1 to {MAX_NAME} bytes"));
    }
    if token.id.len() != ID * 2 || unhex::<ID>(&token.id).is_none() {
        return Err(format!("id: expected {} hexadecimal digits", ID * 2));
    }
    let hash = token.hash.strip_prefix(ALGORITHM).and_then(unhex::<32>);
    let hash =
        hash.ok_or_else(|| format!("hash: expected {ALGORITHM} and 64 hexadecimal digits"))?;
    let identity = token.identity.parse().map_err(|error| format!("{error}"))?;
    Ok(Token { hash, identity })
}

/// Id and secret of what looks like a token.
fn parts(token: &str) -> Option<(&str, &str)> {
    let (id, secret) = token.strip_prefix(PREFIX)?.split_once('_')?;
    (id.len() == ID * 2 && secret.len() == SECRET * 2).then_some((id, secret))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let (digits, rest) = text.as_bytes().as_chunks::<2>();
    if digits.len() != N || !rest.is_empty() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(bytes)
}
