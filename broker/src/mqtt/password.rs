//! Users and their argon2id password hashes, each mapped to an identity.

use std::path::Path;

/// The users of one password file.
#[derive(Debug, Clone, Default)]
pub struct Passwords {}

/// Why a password file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PasswordsError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

impl Passwords {
    /// Reads a password file.
    ///
    /// # Errors
    /// It cannot be read or holds what is no user.
    pub fn load(path: &Path) -> Result<Self, PasswordsError> {
        std::fs::read_to_string(path).map_err(|source| PasswordsError::Read {
            path: path.display().to_string(),
            source,
        })?;
        Ok(Self {})
    }
}
