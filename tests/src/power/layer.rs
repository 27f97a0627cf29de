//! The file system itself: names and lengths go to the folder behind it at once, content only when
//! it is fsynced.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rand::rngs::StdRng;

use super::{Fsync, Loss, Unsynced};

/// The kernel asks again each time: nothing here is about speed.
const UNCACHED: Duration = Duration::ZERO;
/// Node of the root, by FUSE's rule.
const ROOT: u64 = 1;
/// Blocks that `statfs` says there are: 4 TiB, so that no program holds back.
const BLOCKS: u64 = 1 << 30;

/// What the mount and its owner share.
#[derive(Debug)]
pub(super) struct State {
    root: PathBuf,
    fsync: Fsync,
    nodes: Mutex<Nodes>,
    power: Mutex<Power>,
    power_changed: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Power {
    /// Everything works.
    On,
    /// Every request waits.
    Frozen,
    /// Every request fails. The programs that asked are dead and do not see it.
    Off,
}

/// The side of [`State`] that the kernel talks to.
#[derive(Debug)]
pub(super) struct Layer(pub(super) Arc<State>);

#[derive(Debug)]
struct Nodes {
    by_id: HashMap<u64, Node>,
    by_path: HashMap<PathBuf, u64>,
    last_id: u64,
}

#[derive(Debug, Default)]
struct Node {
    /// Relative to the root; of no meaning once it is unlinked.
    path: PathBuf,
    /// There while the file is open or has unsynced writes, so that it outlives its name.
    file: Option<File>,
    handles: u32,
    unsynced: Unsynced,
    unlinked: bool,
}

impl State {
    pub(super) fn new(root: &Path, fsync: Fsync) -> Self {
        let root_node = Node::default();
        Self {
            root: root.to_owned(),
            fsync,
            nodes: Mutex::new(Nodes {
                by_id: HashMap::from([(ROOT, root_node)]),
                by_path: HashMap::from([(PathBuf::new(), ROOT)]),
                last_id: ROOT,
            }),
            power: Mutex::new(Power::On),
            power_changed: Condvar::new(),
        }
    }

    pub(super) fn set_power(&self, power: Power) {
        *self.power.lock().expect("no panic while it is held") = power;
        self.power_changed.notify_all();
    }

    /// Writes what survives to the folder. Answers how many bytes had not been fsynced.
    pub(super) fn lose(&self, loss: Loss, random: &mut StdRng) -> io::Result<u64> {
        let mut nodes = self.nodes();
        let mut ids: Vec<u64> = nodes.by_id.keys().copied().collect();
        // The same seed and the same writes meet the same fate.
        ids.sort_unstable();
        let mut unsynced_bytes = 0;
        for id in ids {
            let node = nodes.by_id.get_mut(&id).expect("it was just listed");
            let unsynced = std::mem::take(&mut node.unsynced);
            unsynced_bytes += unsynced.bytes();
            for write in unsynced.survivors(loss, random) {
                let file = node.file.as_ref().expect("kept with its unsynced writes");
                file.write_all_at(&write.data, write.offset)?;
            }
        }
        Ok(unsynced_bytes)
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().expect("no panic while it is held")
    }

    fn powered(&self) -> io::Result<()> {
        let power = self.power.lock().expect("no panic while it is held");
        let power = self
            .power_changed
            .wait_while(power, |power| *power == Power::Frozen)
            .expect("no panic while it is held");
        match *power {
            Power::Off => Err(io::Error::from_raw_os_error(Errno::EIO.code())),
            Power::On | Power::Frozen => Ok(()),
        }
    }

    fn on_disk(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    fn attributes(&self, id: u64, node: &Node) -> io::Result<FileAttr> {
        let found = match &node.file {
            Some(file) => file.metadata()?,
            None => fs::symlink_metadata(self.on_disk(&node.path))?,
        };
        let kind = FileType::from_std(found.file_type());
        let size = found.len().max(node.unsynced.end());
        let changed = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        Ok(FileAttr {
            ino: INodeNo(id),
            size,
            blocks: size.div_ceil(512),
            atime: changed,
            mtime: changed,
            ctime: changed,
            crtime: changed,
            kind: kind.unwrap_or(FileType::RegularFile),
            perm: (found.mode() & 0o7777) as u16,
            nlink: u32::try_from(found.nlink()).unwrap_or(1),
            uid: found.uid(),
            gid: found.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn entry(&self, nodes: &mut Nodes, path: PathBuf) -> io::Result<FileAttr> {
        // The name must be there before it gets a node.
        fs::symlink_metadata(self.on_disk(&path))?;
        let id = nodes.intern(path);
        self.attributes(id, nodes.get(id)?)
    }

    fn open(&self, node: &mut Node) -> io::Result<()> {
        if node.file.is_none() {
            let path = self.on_disk(&node.path);
            node.file = Some(OpenOptions::new().read(true).write(true).open(path)?);
        }
        node.handles += 1;
        Ok(())
    }
}

impl Nodes {
    fn get(&self, id: u64) -> io::Result<&Node> {
        self.by_id.get(&id).ok_or_else(stale)
    }

    fn get_mut(&mut self, id: u64) -> io::Result<&mut Node> {
        self.by_id.get_mut(&id).ok_or_else(stale)
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> io::Result<PathBuf> {
        Ok(self.get(parent.0)?.path.join(name))
    }

    fn intern(&mut self, path: PathBuf) -> u64 {
        if let Some(id) = self.by_path.get(&path) {
            return *id;
        }
        self.last_id += 1;
        let node = Node {
            path: path.clone(),
            ..Node::default()
        };
        self.by_id.insert(self.last_id, node);
        self.by_path.insert(path, self.last_id);
        self.last_id
    }

    /// The name is gone. Who has the file open keeps it.
    fn detach(&mut self, path: &Path) {
        if let Some(id) = self.by_path.remove(path)
            && let Some(node) = self.by_id.get_mut(&id)
        {
            node.unlinked = true;
            // Nobody can see its writes any more after a power cut.
            if node.handles == 0 {
                self.by_id.remove(&id);
            }
        }
    }

    /// A name has changed, and with it those below it.
    fn renamed(&mut self, from: &Path, to: &Path) {
        let moved: Vec<PathBuf> = self
            .by_path
            .keys()
            .filter(|path| path.starts_with(from))
            .cloned()
            .collect();
        for old in moved {
            let below = old.strip_prefix(from).expect("they were picked by it");
            let new = if below.as_os_str().is_empty() {
                to.to_owned()
            } else {
                to.join(below)
            };
            if let Some(id) = self.by_path.remove(&old) {
                if let Some(node) = self.by_id.get_mut(&id) {
                    node.path.clone_from(&new);
                }
                self.by_path.insert(new, id);
            }
        }
    }
}

fn stale() -> io::Error {
    io::Error::from_raw_os_error(Errno::ESTALE.code())
}

impl Layer {
    fn look_up(&self, parent: INodeNo, name: &OsStr) -> io::Result<FileAttr> {
        self.0.powered()?;
        let mut nodes = self.0.nodes();
        let path = nodes.child(parent, name)?;
        self.0.entry(&mut nodes, path)
    }

    fn stat(&self, id: u64) -> io::Result<FileAttr> {
        self.0.powered()?;
        let nodes = self.0.nodes();
        self.0.attributes(id, nodes.get(id)?)
    }

    fn change(&self, id: u64, mode: Option<u32>, size: Option<u64>) -> io::Result<FileAttr> {
        self.0.powered()?;
        let mut nodes = self.0.nodes();
        let node = nodes.get_mut(id)?;
        let path = self.0.on_disk(&node.path);
        if let Some(mode) = mode {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode & 0o7777))?;
        }
        if let Some(size) = size {
            node.unsynced.truncate(size);
            match &node.file {
                Some(file) => file.set_len(size)?,
                None => OpenOptions::new().write(true).open(&path)?.set_len(size)?,
            }
        }
        self.0.attributes(id, node)
    }

    fn make(&self, parent: INodeNo, name: &OsStr, mode: u32) -> io::Result<FileAttr> {
        self.0.powered()?;
        let mut nodes = self.0.nodes();
        let path = nodes.child(parent, name)?;
        fs::DirBuilder::new()
            .mode(mode & 0o7777)
            .create(self.0.on_disk(&path))?;
        self.0.entry(&mut nodes, path)
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, kind: FileType) -> io::Result<()> {
        self.0.powered()?;
        let mut nodes = self.0.nodes();
        let path = nodes.child(parent, name)?;
        match kind {
            FileType::Directory => fs::remove_dir(self.0.on_disk(&path))?,
            _ => fs::remove_file(self.0.on_disk(&path))?,
        }
        nodes.detach(&path);
        Ok(())
    }

    fn move_to(&self, from: (INodeNo, &OsStr), to: (INodeNo, &OsStr)) -> io::Result<()> {
        self.0.powered()?;
        let mut nodes = self.0.nodes();
        let from = nodes.child(from.0, from.1)?;
        let to = nodes.child(to.0, to.1)?;
        fs::rename(self.0.on_disk(&from), self.0.on_disk(&to))?;
        if from != to {
            nodes.detach(&to);
            nodes.renamed(&from, &to);
        }
        Ok(())
    }

    fn create_file(&self, parent: INodeNo, name: &OsStr, mode: u32) -> io::Result<FileAttr> {
        self.0.powered()?;
        let mut nodes = self.0.nodes();
        let path = nodes.child(parent, name)?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode & 0o7777)
            .open(self.0.on_disk(&path))?;
        let id = nodes.intern(path);
        let node = nodes.get_mut(id)?;
        self.0.open(node)?;
        self.0.attributes(id, node)
    }

    fn open_file(&self, id: u64) -> io::Result<()> {
        self.0.powered()?;
        self.0.open(self.0.nodes().get_mut(id)?)
    }

    fn read_at(&self, id: u64, offset: u64, size: u32) -> io::Result<Vec<u8>> {
        self.0.powered()?;
        let nodes = self.0.nodes();
        let node = nodes.get(id)?;
        let file = node.file.as_ref().ok_or_else(stale)?;
        let length = file.metadata()?.len().max(node.unsynced.end());
        let count = u64::from(size).min(length.saturating_sub(offset));
        let mut buffer = vec![0; usize::try_from(count).unwrap_or(0)];
        let mut filled = 0;
        while filled < buffer.len() {
            match file.read_at(&mut buffer[filled..], offset + filled as u64)? {
                // The rest exists in memory only.
                0 => break,
                read => filled += read,
            }
        }
        node.unsynced.lay_over(offset, &mut buffer);
        Ok(buffer)
    }

    fn write_at(&self, id: u64, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.powered()?;
        let mut nodes = self.0.nodes();
        nodes.get_mut(id)?.unsynced.write(offset, data);
        Ok(())
    }

    fn close(&self, id: u64) {
        let mut nodes = self.0.nodes();
        let Some(node) = nodes.by_id.get_mut(&id) else {
            return;
        };
        node.handles = node.handles.saturating_sub(1);
        if node.handles == 0 {
            if node.unlinked {
                nodes.by_id.remove(&id);
            } else if node.unsynced.is_empty() {
                node.file = None;
            }
        }
    }

    fn sync(&self, id: u64) -> io::Result<()> {
        self.0.powered()?;
        if self.0.fsync == Fsync::Lying {
            return Ok(());
        }
        let mut nodes = self.0.nodes();
        let node = nodes.get_mut(id)?;
        // The machine below keeps its power, so it need not be asked to fsync.
        for write in node.unsynced.sync() {
            let file = node.file.as_ref().ok_or_else(stale)?;
            file.write_all_at(&write.data, write.offset)?;
        }
        Ok(())
    }

    fn list(&self, id: u64) -> io::Result<Vec<(FileType, std::ffi::OsString)>> {
        self.0.powered()?;
        let path = self.0.on_disk(&self.0.nodes().get(id)?.path);
        let mut entries = vec![
            (FileType::Directory, ".".into()),
            (FileType::Directory, "..".into()),
        ];
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let kind = FileType::from_std(entry.file_type()?).unwrap_or(FileType::RegularFile);
            entries.push((kind, entry.file_name()));
        }
        // A program may read a folder in parts and expects the same order in each.
        entries.sort_by(|a, b| a.1.cmp(&b.1));
        Ok(entries)
    }
}

fn finish(result: io::Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error.into()),
    }
}

fn enter(result: io::Result<FileAttr>, reply: ReplyEntry) {
    match result {
        Ok(attributes) => reply.entry(&UNCACHED, &attributes, Generation(0)),
        Err(error) => reply.error(error.into()),
    }
}

impl Filesystem for Layer {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        enter(self.look_up(parent, name), reply);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.stat(ino.0) {
            Ok(attributes) => reply.attr(&UNCACHED, &attributes),
            Err(error) => reply.error(error.into()),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.change(ino.0, mode, size) {
            Ok(attributes) => reply.attr(&UNCACHED, &attributes),
            Err(error) => reply.error(error.into()),
        }
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        enter(self.make(parent, name, mode & !umask), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        finish(self.remove(parent, name, FileType::RegularFile), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        finish(self.remove(parent, name, FileType::Directory), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if flags.is_empty() {
            finish(self.move_to((parent, name), (newparent, newname)), reply);
        } else {
            reply.error(Errno::EINVAL);
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.open_file(ino.0) {
            // The kernel must not keep pages of its own: they would outlive a power cut.
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
            Err(error) => reply.error(error.into()),
        }
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match self.create_file(parent, name, mode & !umask) {
            Ok(attributes) => reply.created(
                &UNCACHED,
                &attributes,
                Generation(0),
                FileHandle(0),
                FopenFlags::FOPEN_DIRECT_IO,
            ),
            Err(error) => reply.error(error.into()),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.read_at(ino.0, offset, size) {
            Ok(data) => reply.data(&data),
            Err(error) => reply.error(error.into()),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.write_at(ino.0, offset, data) {
            Ok(()) => reply.written(u32::try_from(data.len()).expect("FUSE's own bound")),
            Err(error) => reply.error(error.into()),
        }
    }

    fn flush(
        &self,
        _: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // That a program closes a file brings nothing to the disk.
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.close(ino.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        finish(self.sync(ino.0), reply);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // Names are on disk at once.
        finish(self.0.powered(), reply);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = match self.list(ino.0) {
            Ok(entries) => entries,
            Err(error) => return reply.error(error.into()),
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, (kind, name)) in entries.into_iter().enumerate().skip(start) {
            // Nodes are given out by lookup alone; here any number other than zero will do.
            if reply.add(INodeNo(index as u64 + 1), index as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(BLOCKS, BLOCKS, BLOCKS, BLOCKS, BLOCKS, 4096, 255, 4096);
    }
}
