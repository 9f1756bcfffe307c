//! The file that `--output` names.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

/// A file that appears under its name when it is complete, and leaves nothing behind when it never is: until then
/// it has no name at all, so that not even the process's sudden end leaves one. Where the file system has no such
/// files (`O_TMPFILE`, open(2)) it has a hidden name, which is removed unless the process is killed.
#[derive(Debug)]
pub(crate) struct Output {
    path: PathBuf,
    /// A name in the same folder, for as long as the file is not complete.
    temporary: PathBuf,
    named: bool,
    file: File,
}

impl Output {
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let failed = || format!("cannot write {}", path.display());
        let path = target(path).with_context(failed)?;
        let existing = fs::metadata(&path).ok();
        if existing.as_ref().is_some_and(|existing| !existing.is_file()) {
            return Err(anyhow!("it exists and is not a regular file; name another").context(failed()));
        }
        let Some(name) = path.file_name() else {
            return Err(anyhow!("it is not the name of a file").context(failed()));
        };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".underpass-{}", std::process::id()));
        let temporary = path.with_file_name(hidden);
        let unnamed = open_unnamed(temporary.parent());
        let named = unnamed.is_none();
        let file = match unnamed {
            Some(file) => file,
            None => OpenOptions::new().write(true).create_new(true).open(&temporary).with_context(failed)?,
        };
        let output = Self { path, temporary, named, file };
        if let Some(existing) = existing {
            output.file.set_permissions(existing.permissions()).with_context(failed)?;
        }
        Ok(output)
    }

    /// Adds these bytes.
    pub(crate) fn write(&mut self, data: &[u8]) -> anyhow::Result<()> {
        self.file.write_all(data).with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Gives it its name.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        self.rename().with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn rename(&mut self) -> io::Result<()> {
        if !self.named {
            // A file without a name gets one only where none is, so what is there is replaced in a second step.
            let file = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            rustix::fs::linkat(CWD, file, CWD, &self.temporary, AtFlags::SYMLINK_FOLLOW)?;
            self.named = true;
        }
        fs::rename(&self.temporary, &self.path)?;
        self.named = false;
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.named {
            // Nothing is left to be told: the failure that led here is.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// A file without a name in `folder`, where that is possible.
fn open_unnamed(folder: Option<&Path>) -> Option<File> {
    let folder = folder.filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    // It gets its name through /proc.
    if !Path::new("/proc/self/fd").exists() {
        return None;
    }
    rustix::fs::open(folder, flags, Mode::from_raw_mode(0o666)).ok().map(File::from)
}

/// What `path` names, through links, whether or not it exists: a link stays a link, and what it points to is
/// replaced.
fn target(path: &Path) -> io::Result<PathBuf> {
    // As many as Linux follows (path_resolution(7)).
    const LINKS: usize = 40;
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match fs::read_link(&path) {
            // A relative one is relative to its folder; an absolute one replaces all.
            Ok(to) => path = path.parent().unwrap_or(Path::new("")).join(to),
            Err(_) => return Ok(path),
        }
    }
    Err(Errno::LOOP.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("underpass-output-{}-{name}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn names(&self) -> usize {
            fs::read_dir(&self.0).unwrap().count()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn an_unfinished_file_has_no_name() {
        let scratch = Scratch::new("unnamed");
        if open_unnamed(Some(&scratch.0)).is_none() {
            return;
        }
        let mut output = Output::create(&scratch.0.join("out")).unwrap();
        output.write(b"half").unwrap();
        assert_eq!(scratch.names(), 0);
        output.finish().unwrap();
        assert_eq!(fs::read(scratch.0.join("out")).unwrap(), b"half");
        assert_eq!(scratch.names(), 1);
    }

    #[test]
    fn a_named_one_is_removed_or_renamed() {
        let scratch = Scratch::new("named");
        let named = || {
            let temporary = scratch.0.join(".out");
            let file = File::create(&temporary).unwrap();
            Output { path: scratch.0.join("out"), temporary, named: true, file }
        };
        drop(named());
        assert_eq!(scratch.names(), 0);
        named().finish().unwrap();
        assert_eq!(scratch.names(), 1);
        assert!(scratch.0.join("out").exists());
    }

    #[test]
    fn links_stay_links() {
        let scratch = Scratch::new("links");
        let (first, second, file) =
            (scratch.0.join("first"), scratch.0.join("second"), scratch.0.join("file"));
        symlink("second", &first).unwrap();
        symlink(&file, &second).unwrap();
        for round in [b"new", b"old"] {
            let mut output = Output::create(&first).unwrap();
            output.write(round).unwrap();
            output.finish().unwrap();
            assert_eq!(fs::read(&file).unwrap(), round);
            assert!(fs::symlink_metadata(&first).unwrap().is_symlink());
            assert!(fs::symlink_metadata(&second).unwrap().is_symlink());
        }
        let circle = scratch.0.join("circle");
        symlink("circle", &circle).unwrap();
        assert!(Output::create(&circle).is_err());
    }
}
