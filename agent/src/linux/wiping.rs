//! Memory that is overwritten when it is given back: whatever held a key, ours or a library's, does not hold it any longer.
//!
//! What is on the stack, or in what C code has taken, is not reached; the C code here (aws-lc) overwrites its own.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    hint::black_box,
    ptr,
};

/// An allocator on top of another one.
pub struct Wiping<A = System>(pub A);

// SAFETY: blocks and layouts are handed through as they are; a block is written to within its layout, before it is freed.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Wiping<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the same.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    // A block that grows or shrinks is copied to a new one, as the trait does by itself: so the old one is wiped.
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block is of that size, and nobody uses it any more. That it is looked at keeps the compiler from
        // leaving out what it takes for writes that nobody reads.
        unsafe {
            ptr::write_bytes(block, 0, layout.size());
            self.0.dealloc(black_box(block), layout);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Counts what it gets back wiped and not wiped, and frees nothing.
    #[derive(Default)]
    struct Watching {
        wiped: AtomicUsize,
        not: AtomicUsize,
    }

    // SAFETY: it is the system's, but for blocks that stay.
    unsafe impl GlobalAlloc for Watching {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            // SAFETY: the caller's promises are the same.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
            // SAFETY: the block has not been freed.
            let bytes = unsafe { std::slice::from_raw_parts(block, layout.size()) };
            let count = if bytes.iter().all(|byte| *byte == 0) { &self.wiped } else { &self.not };
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_is_given_back_or_grows_is_overwritten() {
        let allocator = Wiping(Watching::default());
        for size in [1, 7, 32, 4096, 70_000] {
            let layout = Layout::from_size_align(size, 8).unwrap();
            // SAFETY: blocks of that layout, written to within it, given back once.
            unsafe {
                let block = allocator.alloc(layout);
                ptr::write_bytes(block, 0xa5, size);
                let grown = allocator.realloc(block, layout, size + 8);
                assert_eq!(*grown.add(size - 1), 0xa5);
                allocator.dealloc(grown, Layout::from_size_align(size + 8, 8).unwrap());
            }
        }
        assert_eq!([&allocator.0.wiped, &allocator.0.not].map(|n| n.load(Ordering::Relaxed)), [10, 0]);
    }
}
