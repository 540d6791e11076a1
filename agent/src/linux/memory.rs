//! What an agent holds of memory and does not use: code that only a start runs, and heap that was free when more came.
//!
//! Whatever page of code is touched, the kernel maps the 16 or 32 around it that it has in its cache. Starting touches a
//! little of everything, so that nearly all of the program counts as resident from then on, though an idle agent runs a
//! third of it.

use std::{fs, io};

/// Unmaps the pages of this program's code; those that are run again are mapped again, out of the kernel's cache. Returns
/// how many bytes of address space that concerns.
///
/// # Errors
/// `/proc` is not there or not as expected, or the kernel refuses.
pub fn release_code() -> io::Result<usize> {
    let program = fs::read_link("/proc/self/exe")?;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let code = maps.lines().filter_map(|line| executable(line, program.to_str()?));
    let mut released = 0;
    for (start, end) in code {
        // SAFETY: the range is one whole mapping of a file, private and never written to, so its pages are the file's: what
        // is read or run there is the same before and after.
        let done = unsafe {
            libc::madvise(std::ptr::without_provenance_mut(start), end - start, libc::MADV_DONTNEED)
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        released += end - start;
    }
    Ok(released)
}

/// Gives free pages of the heap back to the kernel, also those between others that are in use. Only GNU's library holds any.
pub fn release_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: only touches what is free, under the heap's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The range of a line of `/proc/PID/maps`, if that is code of the file `program`.
fn executable(line: &str, program: &str) -> Option<(usize, usize)> {
    // start-end permissions offset device inode path
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions) = (fields.next()?, fields.next()?);
    let path = line.get(line.find('/')?..)?;
    let (start, end) = range.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    (permissions == "r-xp" && path == program).then_some((number(start)?, number(end)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_programs_own_code_is_released() {
        let line = "55e0c8e6d000-55e0ca89e000 r-xp 00707000 fe:00 1234   /usr/bin/weft of mine";
        assert_eq!(executable(line, "/usr/bin/weft of mine"), Some((0x55e0_c8e6_d000, 0x55e0_ca89_e000)));
        assert_eq!(executable(line, "/usr/bin/weft"), None);
        assert_eq!(executable(&line.replace("r-xp", "r--p"), "/usr/bin/weft of mine"), None);
        assert_eq!(executable(&line.replace("r-xp", "rwxp"), "/usr/bin/weft of mine"), None);
        assert_eq!(executable("7ffd1000-7ffd2000 r-xp 00000000 00:00 0    [vdso]", "/usr/bin/weft"), None);
    }

    #[test]
    fn the_program_goes_on_and_holds_less() {
        let resident = || {
            let pages = fs::read_to_string("/proc/self/statm").unwrap();
            pages.split_ascii_whitespace().nth(2).unwrap().parse::<usize>().unwrap()
        };
        // Has all of the code mapped, as after a long life.
        let program = fs::read_link("/proc/self/exe").unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let (start, end) = maps.lines().find_map(|line| executable(line, program.to_str().unwrap())).unwrap();
        // SAFETY: asks for the pages of a mapping that is there.
        let populated = unsafe {
            libc::madvise(std::ptr::without_provenance_mut(start), end - start, libc::MADV_POPULATE_READ)
        };
        assert_eq!(populated, 0, "{}", io::Error::last_os_error());
        let before = resident();
        let released = release_code().unwrap();
        assert_eq!(released, end - start);
        let after = resident();
        assert!(after < before - released / 4096 / 2, "{before} pages before, {after} after");
    }
}
