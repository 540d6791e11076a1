/* Preloaded into an agent: the file that WEFT_LAB_CLOCK names says by how many seconds its wall clock is off, and how many
   seconds have passed for it alone. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile struct { int64_t wall, passed; } *offset;

__attribute__((constructor)) static void look_for_offset(void) {
    const char *path = getenv("WEFT_LAB_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *map = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    if (map != MAP_FAILED) offset = map;
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    if (result != 0 || !offset) return result;
    if (clock == CLOCK_REALTIME) time->tv_sec += offset->wall;
    if (clock == CLOCK_MONOTONIC || clock == CLOCK_BOOTTIME) time->tv_sec += offset->passed;
    return result;
}
