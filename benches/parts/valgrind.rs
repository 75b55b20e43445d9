//! What a program that runs under callgrind can ask of it (`valgrind/callgrind.h`).

/// `VG_USERREQ_TOOL_BASE('C', 'T')`.
const BASE: usize = 0x4354_0000;

/// Forgets what was counted.
pub fn zero() {
    ask(BASE + 1, 0);
}

/// Begins to count, or stops.
pub fn toggle() {
    ask(BASE + 2, 0);
}

/// Writes what was counted, under this name.
pub fn dump(name: &std::ffi::CStr) {
    ask(BASE + 3, name.as_ptr() as usize);
}

/// Looks at every instruction from now on; before, the program runs several times faster.
pub fn start() {
    ask(BASE + 4, 0);
}

/// No longer.
pub fn stop() {
    ask(BASE + 5, 0);
}

#[cfg(target_arch = "x86_64")]
fn ask(request: usize, argument: usize) {
    let request = [request, argument, 0, 0, 0, 0];
    // SAFETY: the rotations come to 128 bits, so `rdi` is as before, and exchanging a register with itself
    // does nothing: outside valgrind this is no operation. Valgrind reads `request`, which outlives it,
    // and writes `rdx`.
    unsafe {
        std::arch::asm!(
            "rol rdi, 3", "rol rdi, 13", "rol rdi, 61", "rol rdi, 51",
            "xchg rbx, rbx",
            in("rax") request.as_ptr(),
            inout("rdx") 0usize => _,
            options(nostack),
        );
    }
}

#[cfg(target_arch = "aarch64")]
fn ask(request: usize, argument: usize) {
    let request = [request, argument, 0, 0, 0, 0];
    // SAFETY: the rotations come to 128 bits, so `x12` is as before, and `orr` of a register with itself
    // does nothing: outside valgrind this is no operation. Valgrind reads `request`, which outlives it,
    // and writes `x3`.
    unsafe {
        std::arch::asm!(
            "ror x12, x12, #3", "ror x12, x12, #13", "ror x12, x12, #51", "ror x12, x12, #61",
            "orr x10, x10, x10",
            in("x4") request.as_ptr(),
            inout("x3") 0usize => _,
            options(nostack),
        );
    }
}
