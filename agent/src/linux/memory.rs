//! What an agent holds of memory and does not use: code that only a start runs, and heap that was free when more came.
//!
//! Whatever page of a program is touched, the kernel maps up to 16 around it that it has in its cache. Starting touches a
//! little of everything, and an idle agent a little of much: so nearly all of the program would count as resident for good.
//! But the kernel maps nothing around a page that lies in an area under another advice.

use nix::time::{ClockId, clock_gettime};
use std::{fs, io, ptr, time::Duration};

/// The program's code and constants.
pub struct Program {
    areas: Vec<(usize, usize)>,
}

impl Program {
    /// Has the kernel map them page by page from now on. To be done once.
    ///
    /// # Errors
    /// `/proc` is not there or not as expected, or the kernel refuses.
    pub fn split() -> io::Result<Self> {
        let program = fs::read_link("/proc/self/exe")?;
        let maps = fs::read_to_string("/proc/self/maps")?;
        let areas: Vec<_> = maps.lines().filter_map(|line| constant(line, program.to_str()?)).collect();
        for &(start, end) in &areas {
            // They are in no core dump anyway, so this advice says nothing but that one page is not the next.
            for page in (start..end).step_by(2 * PAGE) {
                advise(page, end.min(page + PAGE), libc::MADV_DONTDUMP)?;
            }
        }
        Ok(Self { areas })
    }

    /// Unmaps them; what is used again is mapped again, out of the kernel's cache.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn release(&self) -> io::Result<()> {
        self.areas.iter().try_for_each(|&(start, end)| advise(start, end, libc::MADV_DONTNEED))
    }
}

/// Advises the kernel about a part of one of the areas that [`constant`] finds.
fn advise(start: usize, end: usize, advice: i32) -> io::Result<()> {
    // SAFETY: the range is of a private mapping of a file that is never written to, so its pages are the file's: what is read
    // or run there is the same before and after.
    match unsafe { libc::madvise(ptr::without_provenance_mut(start), end - start, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives free pages of the heap back to the kernel, also those between others that are in use. Only GNU's library holds any.
pub fn release_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: only touches what is free, under the heap's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What this process has had of the processors.
pub fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Bytes that this process has in memory, its own and those of files.
///
/// # Errors
/// `/proc` is not there or not as expected.
pub fn resident() -> io::Result<usize> {
    // proc(5): all that is mapped, resident, of these pages of files, …
    let pages = fs::read_to_string("/proc/self/statm")?;
    let resident = pages.split_ascii_whitespace().nth(1).and_then(|pages| pages.parse::<usize>().ok());
    resident.map(|pages| pages * PAGE).ok_or_else(|| io::Error::other("/proc/self/statm is not as expected"))
}

/// The range of a line of `/proc/PID/maps`, if what is there is the same as in the file `program`: its code, and the constants
/// before it, but not those that the loader has filled in.
fn constant(line: &str, program: &str) -> Option<(usize, usize)> {
    // start-end permissions offset device inode path
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions, offset) = (fields.next()?, fields.next()?, fields.next()?);
    let path = line.get(line.find('/')?..)?;
    let (start, end) = range.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    let constant = permissions == "r-xp" || (permissions == "r--p" && number(offset)? == 0);
    (constant && path == program).then_some((number(start)?, number(end)?))
}

const PAGE: usize = 4 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_as_in_the_programs_file_is_released() {
        let line = "55e0c8e6d000-55e0ca89e000 r-xp 00707000 fe:00 1234   /usr/bin/weft of mine";
        let range = Some((0x55e0_c8e6_d000, 0x55e0_ca89_e000));
        assert_eq!(constant(line, "/usr/bin/weft of mine"), range);
        assert_eq!(constant(line, "/usr/bin/weft"), None);
        let constants = line.replace("r-xp", "r--p");
        assert_eq!(constant(&constants, "/usr/bin/weft of mine"), None, "filled in by the loader");
        let constants = constants.replace("00707000", "00000000");
        assert_eq!(constant(&constants, "/usr/bin/weft of mine"), range);
        assert_eq!(constant(&line.replace("r-xp", "rwxp"), "/usr/bin/weft of mine"), None);
        assert_eq!(constant("7ffd1000-7ffd2000 r-xp 00000000 00:00 0    [vdso]", "/usr/bin/weft"), None);
    }

    #[test]
    fn the_program_goes_on_and_holds_less() {
        let program = Program::split().unwrap();
        for turn in 0..2 {
            // Has all of it mapped, as after a long life.
            for &(start, end) in &program.areas {
                advise(start, end, libc::MADV_POPULATE_READ).unwrap();
            }
            let before = resident().unwrap();
            program.release().unwrap();
            let after = resident().unwrap();
            let size: usize = program.areas.iter().map(|(start, end)| end - start).sum();
            assert!(after < before - size / 2, "turn {turn}: {before} bytes before, {after} after");
        }
    }
}
