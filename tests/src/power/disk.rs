//! The disk as its owner handles it: mounted, frozen, and mounted again after a power cut.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuser::{BackgroundSession, Config, MountOption, Session};
use rand::rngs::StdRng;

use super::layer::{Layer, Power, State};
use super::{Fsync, Loss};

/// A folder whose content is only as safe as its programs make it. Dropping it unmounts it.
///
/// To cut the power: [`FragileDisk::freeze`], send SIGKILL to every program that uses it,
/// [`FragileDisk::let_go`], wait until the programs are gone, [`FragileDisk::cut`].
#[derive(Debug)]
pub struct FragileDisk {
    folder: PathBuf,
    place: PathBuf,
    fsync: Fsync,
    mounted: Option<(BackgroundSession, Arc<State>)>,
}

impl FragileDisk {
    /// Mounts it at `place`; what is safe lies in `folder`. Both are made if need be.
    ///
    /// # Errors
    /// FUSE is not there, or the process may not mount.
    pub fn mount(folder: &Path, place: &Path, fsync: Fsync) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        std::fs::create_dir_all(place)?;
        let mut disk = Self {
            folder: folder.to_owned(),
            place: place.to_owned(),
            fsync,
            mounted: None,
        };
        disk.start()?;
        Ok(disk)
    }

    /// Where programs find it.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// From now on every request waits: nothing more gets to the disk, and no fsync returns.
    pub fn freeze(&self) {
        self.set(Power::Frozen);
    }

    /// Ends the wait of programs that were sent SIGKILL, which could not end while they wait.
    pub fn let_go(&self) {
        self.set(Power::Off);
    }

    /// The power has gone and comes back. Answers how many bytes had not been fsynced.
    ///
    /// # Errors
    /// It cannot be unmounted, written or mounted again.
    pub fn cut(&mut self, loss: Loss, random: &mut StdRng) -> io::Result<u64> {
        let (session, state) = self.mounted.take().expect("mounted again by every cut");
        session.umount_and_join()?;
        let unsynced = state.lose(loss, random)?;
        drop(state);
        self.start()?;
        Ok(unsynced)
    }

    fn start(&mut self) -> io::Result<()> {
        let state = Arc::new(State::new(&self.folder, self.fsync));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("fragile".to_owned())];
        let session = Session::new(Layer(Arc::clone(&state)), &self.place, &config)?;
        self.mounted = Some((session.spawn()?, state));
        Ok(())
    }

    fn set(&self, power: Power) {
        let (_, state) = self.mounted.as_ref().expect("mounted again by every cut");
        state.set_power(power);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs::{self, File, OpenOptions};
    use std::io::{Read as _, Write as _};

    use rand::SeedableRng as _;

    use super::*;

    /// A disk, or `None` with a line that says so where nothing can be mounted.
    fn disk(folder: &Path, fsync: Fsync) -> Option<FragileDisk> {
        let mounted = FragileDisk::mount(&folder.join("disk"), &folder.join("place"), fsync);
        mounted
            .inspect_err(|error| {
                let skipped = format!("SKIPPED: no FUSE file system can be mounted: {error}\n");
                let _ = std::io::stderr().write_all(skipped.as_bytes());
            })
            .ok()
    }

    fn random() -> StdRng {
        StdRng::seed_from_u64(7)
    }

    #[test]
    fn what_was_fsynced_is_there_after_a_power_cut_and_the_rest_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let Some(mut disk) = disk(folder.path(), Fsync::Honest) else {
            return;
        };
        let place = disk.place().join("a");
        let mut file = File::create(&place).unwrap();
        file.write_all(b"safe").unwrap();
        file.sync_data().unwrap();
        file.write_all(b", and not").unwrap();
        // A program sees its own writes before they are safe, over any handle.
        assert_eq!(fs::read(&place).unwrap(), b"safe, and not");
        drop(file);
        assert_eq!(fs::metadata(&place).unwrap().len(), 13);
        assert_eq!(disk.cut(Loss::Everything, &mut random()).unwrap(), 9);
        assert_eq!(fs::read(&place).unwrap(), b"safe");
    }

    #[test]
    fn a_disk_that_lies_keeps_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let Some(mut disk) = disk(folder.path(), Fsync::Lying) else {
            return;
        };
        let place = disk.place().join("a");
        let mut file = File::create(&place).unwrap();
        file.write_all(b"safe").unwrap();
        file.sync_all().unwrap();
        drop(file);
        disk.cut(Loss::Everything, &mut random()).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"");
    }

    #[test]
    fn files_are_appended_to_cut_off_renamed_and_removed_as_on_any_disk() {
        let folder = tempfile::tempdir().unwrap();
        let Some(disk) = disk(folder.path(), Fsync::Honest) else {
            return;
        };
        let inner = disk.place().join("b/c");
        fs::create_dir_all(&inner).unwrap();
        let place = inner.join("journal");
        let options = OpenOptions::new().create(true).append(true).clone();
        let mut file = options.open(&place).unwrap();
        file.write_all(b"one ").unwrap();
        file.sync_all().unwrap();
        file.write_all(b"two").unwrap();
        drop(file);
        let mut file = options.open(&place).unwrap();
        file.write_all(b" three").unwrap();
        file.set_len(5).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"one t");
        let other = inner.join("other");
        fs::write(&other, b"replaced").unwrap();
        let mut old = File::open(&other).unwrap();
        fs::rename(&place, &other).unwrap();
        file.sync_all().unwrap();
        assert_eq!(fs::read(&other).unwrap(), b"one t");
        let mut still = String::new();
        old.read_to_string(&mut still).unwrap();
        assert_eq!(still, "replaced");
        fs::rename(&inner, disk.place().join("d")).unwrap();
        let moved = disk.place().join("d/other");
        assert_eq!(fs::read(&moved).unwrap(), b"one t");
        fs::remove_file(&moved).unwrap();
        // Who has it open keeps it.
        assert_eq!(file.metadata().unwrap().len(), 5);
        assert_eq!(fs::read_dir(disk.place().join("d")).unwrap().count(), 0);
        fs::remove_dir(disk.place().join("d")).unwrap();
    }

    #[test]
    fn an_fsync_does_not_return_once_the_disk_is_frozen() {
        let folder = tempfile::tempdir().unwrap();
        let Some(mut disk) = disk(folder.path(), Fsync::Honest) else {
            return;
        };
        let place = disk.place().join("a");
        let mut file = File::create(&place).unwrap();
        file.write_all(b"x").unwrap();
        disk.freeze();
        let syncing = std::thread::spawn(move || file.sync_all());
        disk.let_go();
        assert!(syncing.join().unwrap().is_err());
        disk.cut(Loss::Everything, &mut random()).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"");
    }
}
