//! Users and their argon2id password hashes, each mapped to an identity.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use argon2::Argon2;
use argon2::password_hash::rand_core::OsRng;
use argon2::password_hash::{
    Error as HashError, PasswordHash, PasswordHasher as _, PasswordVerifier as _, SaltString,
};
use bytes::Bytes;
use selvedge_certs::Identity;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

/// Verifications at once. Each takes a core and 19 MiB for some 20 ms; more wait their turn, within
/// the time a connection has to come up.
const CONCURRENT: usize = 4;

/// The users of one password file. Cheap to clone.
#[derive(Clone)]
pub struct Passwords(Arc<Inner>);

struct Inner {
    users: HashMap<String, User>,
    /// Verified for names that are nobody's, so that they take as long as a wrong password.
    decoy: String,
    slots: Arc<Semaphore>,
}

#[derive(Clone)]
struct User {
    hash: String,
    identity: Identity,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    user: Vec<FileUser>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileUser {
    name: String,
    hash: String,
    identity: String,
}

/// Why a password file cannot be used or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PasswordsError {
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
    /// The file is no list of users.
    #[error("{path}: expected tables [[user]] with name, hash and identity: {problem}")]
    Syntax {
        /// The file.
        path: String,
        /// Where and what, without the line itself, which may hold a hash.
        problem: String,
    },
    /// Some users are wrong.
    #[error("{path}: {}", .problems.join("; "))]
    Users {
        /// The file.
        path: String,
        /// Everything that is wrong.
        problems: Vec<String>,
    },
    /// A password cannot be hashed.
    #[error(transparent)]
    Hash(#[from] PasswordHashError),
}

/// Why a password cannot be hashed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PasswordHashError {
    /// There is none.
    #[error("the password is empty")]
    Empty,
    /// The algorithm refuses, for example because there is no memory for it.
    #[error("cannot hash the password: {0}")]
    Algorithm(String),
}

impl Passwords {
    /// Reads a password file.
    ///
    /// # Errors
    /// It cannot be read, or some of it is no user; every problem is named.
    pub fn load(path: &Path) -> Result<Self, PasswordsError> {
        let name = path.display().to_string();
        let file = read(path)?;
        let mut problems = Vec::new();
        let mut users = HashMap::new();
        for (index, user) in file.user.into_iter().enumerate() {
            match check(&user) {
                Ok(identity) => {
                    let known = User {
                        hash: user.hash,
                        identity,
                    };
                    if users.insert(user.name.clone(), known).is_some() {
                        problems.push(format!("user {:?} is there twice", user.name));
                    }
                }
                Err(found) => problems.extend(
                    found
                        .into_iter()
                        .map(|problem| format!("user {} ({:?}): {problem}", index + 1, user.name)),
                ),
            }
        }
        if !problems.is_empty() {
            return Err(PasswordsError::Users {
                path: name,
                problems,
            });
        }
        Ok(Self(Arc::new(Inner {
            users,
            decoy: hash_password("no one has this password")?,
            slots: Arc::new(Semaphore::new(CONCURRENT)),
        })))
    }

    /// The identity of a user who proves the password. `None` does not tell a wrong password from
    /// an unknown user, and takes as long for one as for the other.
    pub async fn verify(&self, name: &str, password: &Bytes) -> Option<Identity> {
        let user = self.0.users.get(name).cloned();
        let hash = match &user {
            Some(user) => user.hash.clone(),
            None => self.0.decoy.clone(),
        };
        let slot = Arc::clone(&self.0.slots).acquire_owned().await.ok()?;
        let password = password.clone();
        let matches = tokio::task::spawn_blocking(move || {
            // Held to the end even if the connection has gone: the work goes on without it.
            let _slot = slot;
            PasswordHash::new(&hash)
                .is_ok_and(|hash| Argon2::default().verify_password(&password, &hash).is_ok())
        })
        .await
        .unwrap_or(false);
        user.filter(|_| matches).map(|user| user.identity)
    }

    /// How many users there are.
    pub fn len(&self) -> usize {
        self.0.users.len()
    }

    /// Whether there is no user.
    pub fn is_empty(&self) -> bool {
        self.0.users.is_empty()
    }
}

impl fmt::Debug for Passwords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: HashSet<&str> = self.0.users.keys().map(String::as_str).collect();
        f.debug_tuple("Passwords").field(&names).finish()
    }
}

/// The argon2id hash of a password with a new salt, as the file holds it.
///
/// # Errors
/// The password is empty.
pub fn hash_password(password: &str) -> Result<String, PasswordHashError> {
    if password.is_empty() {
        return Err(PasswordHashError::Empty);
    }
    let salt = SaltString::generate(&mut OsRng);
    Argon2::default()
        .hash_password(password.as_bytes(), &salt)
        .map(|hash| hash.to_string())
        .map_err(|error: HashError| PasswordHashError::Algorithm(error.to_string()))
}

/// Adds a user to a password file, or gives one another password and identity. The file comes into
/// being if there is none. It changes as a whole or not at all, and only its owner may read it;
/// comments in it are lost.
///
/// # Errors
/// The file cannot be read or written, is no password file, or user or password are not usable.
pub fn set_user(
    path: &Path,
    name: &str,
    identity: &Identity,
    password: &str,
) -> Result<(), PasswordsError> {
    let mut file = match read(path) {
        Err(PasswordsError::Read { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound =>
        {
            File::default()
        }
        other => other?,
    };
    let user = FileUser {
        name: name.to_owned(),
        hash: hash_password(password)?,
        identity: identity.uri().to_owned(),
    };
    check(&user).map_err(|problems| PasswordsError::Users {
        path: path.display().to_string(),
        problems,
    })?;
    file.user.retain(|held| held.name != name);
    file.user.push(user);
    let text = toml::to_string(&file).map_err(|error| PasswordsError::Syntax {
        path: path.display().to_string(),
        problem: error.to_string(),
    })?;
    replace(path, text.as_bytes()).map_err(|source| PasswordsError::Write {
        path: path.display().to_string(),
        source,
    })
}

fn read(path: &Path) -> Result<File, PasswordsError> {
    let text = std::fs::read_to_string(path).map_err(|source| PasswordsError::Read {
        path: path.display().to_string(),
        source,
    })?;
    toml::from_str(&text).map_err(|error| PasswordsError::Syntax {
        path: path.display().to_string(),
        problem: error.message().to_owned(),
    })
}

fn check(user: &FileUser) -> Result<Identity, Vec<String>> {
    let mut problems = Vec::new();
    if user.name.is_empty() {
        problems.push("the name is empty".to_owned());
    }
    match PasswordHash::new(&user.hash) {
        Ok(hash) if hash.algorithm.as_str() != "argon2id" => problems.push(format!(
            "expected an argon2id hash, found {}",
            hash.algorithm
        )),
        Ok(hash) if hash.hash.is_none() => {
            problems.push("the hash has parameters only, no value".to_owned());
        }
        Ok(_) => {}
        // The hash itself is never printed.
        Err(error) => problems.push(format!("expected a hash as $argon2id$…: {error}")),
    }
    match user.identity.parse() {
        Ok(identity) if problems.is_empty() => return Ok(identity),
        Ok(_) => {}
        Err(error) => problems.push(error.to_string()),
    }
    Err(problems)
}

/// Writes beside the file and renames, so that a reader sees the old file or the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let beside: PathBuf = path.with_file_name(name);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&beside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written
        .and_then(|()| std::fs::rename(&beside, path))
        .inspect_err(|_| {
            let _ = std::fs::remove_file(&beside);
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const IDENTITY: &str = "spiffe://example.org/acme/berlin/sensor-1";

    fn identity() -> Identity {
        IDENTITY.parse().unwrap()
    }

    #[tokio::test]
    async fn a_user_that_was_set_proves_the_last_password_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users.toml");
        set_user(&path, "sensor", &identity(), "first").unwrap();
        set_user(&path, "other", &identity(), "other").unwrap();
        set_user(&path, "sensor", &identity(), "second").unwrap();
        let passwords = Passwords::load(&path).unwrap();
        assert_eq!(passwords.len(), 2);
        let verify = async |name: &str, password: &'static str| {
            passwords.verify(name, &password.as_bytes().into()).await
        };
        assert_eq!(verify("sensor", "second").await, Some(identity()));
        assert_eq!(verify("sensor", "first").await, None);
        assert_eq!(verify("sensor", "").await, None);
        assert_eq!(verify("nobody", "second").await, None);
        assert_eq!(verify("nobody", "no one has this password").await, None);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(!format!("{passwords:?}").contains("argon2id"));
    }

    #[cfg(unix)]
    #[test]
    fn only_the_owner_may_read_the_file() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users.toml");
        set_user(&path, "sensor", &identity(), "secret").unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn every_problem_is_named_and_no_hash_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users.toml");
        let good = hash_password("x").unwrap();
        let old = good.replace("argon2id", "argon2i");
        let text = format!(
            "[[user]]\nname = \"\"\nhash = \"plain secret\"\nidentity = \"nobody\"\n\
             [[user]]\nname = \"a\"\nhash = \"{good}\"\nidentity = \"{IDENTITY}\"\n\
             [[user]]\nname = \"a\"\nhash = \"{good}\"\nidentity = \"{IDENTITY}\"\n\
             [[user]]\nname = \"b\"\nhash = \"{old}\"\n\
             identity = \"{IDENTITY}\"\n"
        );
        std::fs::write(&path, text).unwrap();
        let Err(PasswordsError::Users { problems, .. }) = Passwords::load(&path) else {
            panic!("the file is wrong");
        };
        assert_eq!(problems.len(), 5, "{problems:?}");
        assert!(problems[0].contains("the name is empty"));
        assert!(problems[1].contains("expected a hash"));
        assert!(problems[3].contains("there twice"));
        assert!(problems[4].contains("expected an argon2id hash, found argon2i"));
        assert!(!problems.concat().contains("plain secret"));
    }

    #[test]
    fn a_misspelt_key_and_an_empty_password_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users.toml");
        std::fs::write(&path, "[[users]]\nname = \"a\"\n").unwrap();
        assert!(matches!(
            Passwords::load(&path),
            Err(PasswordsError::Syntax { .. })
        ));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(
            set_user(&path, "a", &identity(), ""),
            Err(PasswordsError::Hash(PasswordHashError::Empty))
        ));
        assert!(!path.exists());
    }
}
