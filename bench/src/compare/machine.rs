//! The machine that a comparison ran on.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What has to be known about a machine to make sense of its figures.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// When the run began, in RFC 3339.
    pub date: String,
    /// Name of the processor.
    pub processor: String,
    /// Processors that may be used.
    pub cores: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// File system of the store, and its device.
    pub file_system: String,
    /// Largest socket buffers that may be asked for, `net.core.rmem_max` and `wmem_max`.
    pub socket_buffers: [u64; 2],
    /// Load average of a minute when the run began.
    pub load: String,
    /// Whether this binary is optimised. Figures of one that is not mean nothing.
    pub optimised: bool,
}

/// Looks at the machine; `store` is where stores will be.
pub(crate) fn describe(store: &Path) -> Machine {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let number = |path: &str| text(path).trim().parse().unwrap_or_default();
    let cpu = text("/proc/cpuinfo");
    let processor = cpu.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_owned())
    });
    let load = text("/proc/loadavg");
    Machine {
        date: OffsetDateTime::now_utc()
            .format(&Rfc3339)
            .unwrap_or_default(),
        processor: processor.unwrap_or_else(|| "unknown".into()),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
        file_system: file_system(&text("/proc/self/mounts"), store),
        socket_buffers: [
            number("/proc/sys/net/core/rmem_max"),
            number("/proc/sys/net/core/wmem_max"),
        ],
        load: load.split(' ').next().unwrap_or_default().to_owned(),
        optimised: !cfg!(debug_assertions),
    }
}

/// Type and device of the file system that a path is on.
fn file_system(mounts: &str, path: &Path) -> String {
    let mount = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            Some((fields.next()?, fields.next()?, fields.next()?))
        })
        .filter(|(_, point, _)| path.starts_with(point))
        // Of two at one point the later hides the earlier.
        .max_by_key(|(_, point, _)| point.len());
    mount.map_or_else(
        || "unknown".into(),
        |(device, _, kind)| format!("{kind} on {device}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_mount_is_found() {
        let mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\nx /tmpest xfs rw 0 0\n";
        assert_eq!(file_system(mounts, Path::new("/tmp/a")), "tmpfs on tmpfs");
        assert_eq!(
            file_system(mounts, Path::new("/var/tmp")),
            "ext4 on /dev/vda"
        );
        assert_eq!(file_system("", Path::new("/")), "unknown");
    }
}
