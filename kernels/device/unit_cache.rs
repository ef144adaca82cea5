//! Compiled units on disk, so that a second run compiles nothing: cubins of `cuda`, shared objects of `cuda-host`.
//!
//! Directory `$FORBACK_CACHE`, else `$XDG_CACHE_HOME/forback`, else `~/.cache/forback` (`%LOCALAPPDATA%\forback` on Windows). Without
//! any of them, or where it cannot be written, everything works and is compiled again in every process: shared objects are loaded
//! from here, so a directory that others can write, such as the temporary one, is never trusted. Entries are named by the hash of
//! everything they depend on, so nothing goes stale, and the directory may be deleted at any time.
//!
//! An entry is its content followed by [`TRAILER`] bytes: a magic number, the content's length and its SHA-256. Writers write a file
//! of their own beside it and rename; readers take only what its trailer confirms. So a torn or corrupt file counts as absent and
//! is replaced, and any number of processes may read and write at once.

use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: &[u8; 8] = b"FORBACK1";
const TRAILER: usize = 8 + 8 + 32;

/// A directory of compiled units, or none.
#[derive(Debug, Clone)]
pub(super) struct UnitCache {
    dir: Option<PathBuf>,
}

/// Name of an entry: the hash of everything that the unit depends on.
pub(super) fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl UnitCache {
    /// The user's cache.
    pub(super) fn user() -> UnitCache {
        let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let dir = var("FORBACK_CACHE")
            .or_else(|| var("XDG_CACHE_HOME").map(|dir| dir.join("forback")))
            .or_else(|| if cfg!(windows) { var("LOCALAPPDATA").map(|dir| dir.join("forback")) } else { None })
            .or_else(|| var("HOME").map(|dir| dir.join(".cache").join("forback")));
        UnitCache::at(dir)
    }

    /// A cache in `dir`; `None` is the cache that holds nothing.
    pub(super) fn at(dir: Option<PathBuf>) -> UnitCache {
        UnitCache { dir }
    }

    /// A verified entry: its file (content and trailer) and its content.
    pub(super) fn load(&self, name: &str) -> Option<(PathBuf, Vec<u8>)> {
        let path = self.dir.as_ref()?.join(name);
        let mut bytes = fs::read(&path).ok()?;
        let length = bytes.len().checked_sub(TRAILER)?;
        let intact = bytes[length..] == trailer(&bytes[..length]);
        bytes.truncate(length);
        intact.then_some((path, bytes))
    }

    /// Stores an entry and returns its file; `None` where the directory cannot be written.
    pub(super) fn store(&self, name: &str, content: &[u8]) -> Option<PathBuf> {
        let dir = self.dir.as_ref()?;
        fs::create_dir_all(dir).ok()?;
        let (own, path) = (dir.join(unique(name)), dir.join(name));
        let written = write(&own, content).and_then(|()| fs::rename(&own, &path));
        if written.is_err() {
            let _ = fs::remove_file(&own);
        }
        written.ok().map(|()| path)
    }
}

fn trailer(content: &[u8]) -> [u8; TRAILER] {
    let mut bytes = [0; TRAILER];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..16].copy_from_slice(&(content.len() as u64).to_le_bytes());
    bytes[16..].copy_from_slice(&Sha256::digest(content));
    bytes
}

fn write(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(content)?;
    file.write_all(&trailer(content))
}

/// A name that no other writer uses.
pub(super) fn unique(name: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.subsec_nanos());
    format!(".{name}.{}-{}-{nanos}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// A fresh directory, removed at the end.
    struct Dir(PathBuf);

    impl Dir {
        fn new() -> Dir {
            let dir = std::env::temp_dir().join(unique("forback-cache-test"));
            fs::create_dir(&dir).unwrap();
            Dir(dir)
        }
        fn cache(&self) -> UnitCache {
            UnitCache::at(Some(self.0.clone()))
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn keys_depend_on_every_part_and_its_bounds() {
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab", ""]));
        assert_ne!(key(&["a", "b"]), key(&["a", "c"]));
    }

    #[test]
    fn torn_and_corrupt_files_count_as_absent_and_are_replaced() {
        let dir = Dir::new();
        let cache = dir.cache();
        assert_eq!(cache.load("unit"), None);
        let path = cache.store("unit", b"the compiled unit").unwrap();
        let whole = fs::read(&path).unwrap();
        assert_eq!(cache.load("unit").unwrap().1, b"the compiled unit");
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(cache.load("unit"), None, "cut at {cut}");
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x40;
            fs::write(&path, &bytes).unwrap();
            assert_eq!(cache.load("unit"), None, "flipped at {at}");
        }
        assert!(cache.store("unit", b"again").is_some());
        assert_eq!(cache.load("unit").unwrap().1, b"again");
    }

    #[test]
    fn concurrent_writers_and_readers_see_whole_entries_only() {
        let dir = Dir::new();
        let cache = dir.cache();
        let content = |i: usize| vec![i as u8; 20_000 + i];
        std::thread::scope(|scope| {
            for i in 0..8 {
                let cache = &cache;
                scope.spawn(move || {
                    for _ in 0..50 {
                        assert!(cache.store("unit", &content(i)).is_some());
                        let (_, read) = cache.load("unit").unwrap();
                        assert_eq!(read, content(read[0] as usize));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1, "no writer's own file is left behind");
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_no_error() {
        let dir = Dir::new();
        let file = dir.0.join("a file, not a directory");
        fs::write(&file, b"").unwrap();
        for cache in [UnitCache::at(None), UnitCache::at(Some(file.join("cache")))] {
            assert_eq!(cache.store("unit", b"content"), None);
            assert_eq!(cache.load("unit"), None);
        }
    }
}
