//! The file of MQTT users and their password hashes.
#![no_main]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use selvedge_broker::mqtt::password::Passwords;
use tempfile::TempDir;

static DIR: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a temporary folder"));
static PATH: LazyLock<PathBuf> = LazyLock::new(|| DIR.path().join("users.toml"));

/// Kept open and overwritten: some file systems wait for the disk after a file is cut to nothing.
static FILE: LazyLock<File> = LazyLock::new(|| {
    let mut private = OpenOptions::new();
    private.write(true).create_new(true).mode(0o600);
    private.open(&*PATH).expect("room in the temporary folder")
});

fuzz_target!(|text: &[u8]| {
    FILE.write_all_at(text, 0).expect("room for a small file");
    FILE.set_len(text.len() as u64)
        .expect("room for a small file");
    match Passwords::load(&PATH) {
        Ok(passwords) => assert_eq!(passwords.is_empty(), passwords.len() == 0),
        Err(error) => drop(error.to_string()),
    }
});
