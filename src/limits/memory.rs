//! How much memory this process may use.
//!
//! Invariant: the machine's memory, or the control group's limit if that is less.

use std::fs;

/// Where Linux tells a machine's memory.
const MACHINE: &str = "/proc/meminfo";
/// Where a control group, version 2 and 1, tells its limit.
const GROUPS: [&str; 2] =
    ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];

/// How much memory this process may use, in bytes; `None` on a system that does not tell.
pub(super) fn bytes() -> Option<usize> {
    let machine = fs::read_to_string(MACHINE).ok().as_deref().and_then(of_machine);
    let groups = GROUPS.iter().filter_map(|path| fs::read_to_string(path).ok());
    groups.filter_map(|text| of_group(&text)).chain(machine).min()
}

/// Reads `MemTotal:       24601204 kB`.
fn of_machine(text: &str) -> Option<usize> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// Reads `1073741824`; `max` is no limit.
fn of_group(text: &str) -> Option<usize> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_is_read_as_the_system_writes_it() {
        let text = "MemFree:  1 kB\nMemTotal:       24601204 kB\nMemAvailable: 2 kB\n";
        assert_eq!(of_machine(text), Some(24_601_204 * 1024));
        assert_eq!(of_machine("MemFree: 1 kB"), None);
        assert_eq!((of_group("1073741824\n"), of_group("max\n")), (Some(1 << 30), None));
    }
}
