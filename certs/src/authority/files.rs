//! Writing the files of an authority so that each appears whole, with its mode, or not at all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{AuthorityError, Overwrite, random_bytes};
use crate::certificate::hex;

/// For private keys.
const OWNER_ONLY: u32 = 0o600;
/// For certificates.
const READABLE: u32 = 0o644;

/// Writes a certificate and a key, each a name and its text, into `dir`, creating it if need be.
pub(super) fn write_pair(
    dir: &Path,
    cert: (&str, &str),
    key: (&str, &str),
    overwrite: Overwrite,
) -> Result<(), AuthorityError> {
    let cert_path = dir.join(cert.0);
    let key_path = dir.join(key.0);
    if overwrite == Overwrite::No {
        // Before anything is written, so that a refusal leaves no half of a pair behind.
        for path in [&key_path, &cert_path] {
            if fs::symlink_metadata(path).is_ok() {
                return Err(AuthorityError::Exists { path: path.clone() });
            }
        }
    }
    create_dir(dir)?;
    write(&key_path, key.1, OWNER_ONLY, overwrite)?;
    write(&cert_path, cert.1, READABLE, overwrite)
}

/// Writes what everybody may read over what is there.
pub(super) fn replace(path: &Path, text: &str) -> Result<(), AuthorityError> {
    write(path, text, READABLE, Overwrite::Yes)
}

/// The text of a file, or nothing if there is no such file.
pub(super) fn read_if_there(path: &Path) -> Result<Option<String>, AuthorityError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

/// Removes a file that may not be there.
pub(super) fn remove(path: &Path) -> Result<(), AuthorityError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Keeps other processes from what the authority's key guards, until it is dropped.
pub(super) fn lock(path: &Path) -> Result<File, AuthorityError> {
    let file = File::open(path).map_err(failed("open", path))?;
    file.lock().map_err(failed("lock", path))?;
    Ok(file)
}

pub(super) fn read(path: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(failed("read", path))
}

/// A temporary file beside the target is filled and synced, then takes the target's name.
fn write(path: &Path, text: &str, mode: u32, overwrite: Overwrite) -> Result<(), AuthorityError> {
    let temporary = Temporary::beside(path)?;
    let mut file = create_new(&temporary.0, mode).map_err(failed("create", &temporary.0))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(failed("write", &temporary.0))?;
    let placed = match overwrite {
        Overwrite::Yes => fs::rename(&temporary.0, path),
        Overwrite::No => place_new(&temporary.0, path),
    };
    placed.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => AuthorityError::Exists {
            path: path.to_owned(),
        },
        _ => failed("write", path)(source),
    })?;
    if let Some(dir) = path.parent()
        && let Ok(dir) = File::open(dir)
    {
        // Best effort: some file systems cannot sync a directory, and the file itself is synced.
        let _ = dir.sync_all();
    }
    Ok(())
}

/// Gives a file its name unless that name is taken.
fn place_new(temporary: &Path, path: &Path) -> io::Result<()> {
    // A rename would replace a file that came into being since we looked; a link does not.
    match fs::hard_link(temporary, path) {
        // FAT and its like, common on memory cards, have no links.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported
            ) && fs::symlink_metadata(path).is_err() =>
        {
            fs::rename(temporary, path)
        }
        placed => placed,
    }
}

/// The name of a temporary file, which is removed on drop unless it was renamed.
struct Temporary(PathBuf);

impl Temporary {
    fn beside(path: &Path) -> Result<Self, AuthorityError> {
        let name = format!(".selvedge-{}.tmp", hex(&random_bytes::<8>()?));
        Ok(Self(path.with_file_name(name)))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn create_new(path: &Path, mode: u32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
    #[cfg(not(unix))]
    let _ = mode;
    options.open(path)
}

fn create_dir(dir: &Path) -> Result<(), AuthorityError> {
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir).map_err(failed("create", dir))
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> AuthorityError {
    let path = path.to_owned();
    move |source| AuthorityError::File {
        action,
        path: path.clone(),
        source,
    }
}
