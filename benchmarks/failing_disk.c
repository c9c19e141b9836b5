// Makes one call on files under a folder fail, and with `sticky` every later one too: gcc -shared -fPIC -ldl.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, SYNC = 4, RENAME = 8, READ = 16 };

static char folder[PATH_MAX];
static int mask, number, error, sticky;
static long calls;

// Counts the calls of these kinds under `path` (none if empty); the n-th fails, 0 lets all pass.
void failing_disk(const char *path, int kinds, int n, int code, int forever) {
    strncpy(folder, path, sizeof folder - 1);
    mask = kinds, number = n, error = code, sticky = forever, calls = 0;
}

long failing_disk_calls(void) { return calls; }

static int fails(int kind, const char *path) {
    if (!folder[0] || !(mask & kind) || !path || strncmp(path, folder, strlen(folder))) return 0;
    long call = __sync_add_and_fetch(&calls, 1);
    if (!number || call < number || (call > number && !sticky)) return 0;
    errno = error;
    return 1;
}

static int descriptor_fails(int kind, int fd) {
    if (!folder[0] || !(mask & kind)) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int saved = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (length < 0) return 0;
    path[length] = 0;
    return fails(kind, path);
}

#define REAL(name) static typeof(name) *real; if (!real) real = (typeof(name) *)dlsym(RTLD_NEXT, #name)
#define ON_DESCRIPTOR(kind, type, name, parameters, arguments) \
    type name parameters { REAL(name); return descriptor_fails(kind, fd) ? -1 : real arguments; }

ON_DESCRIPTOR(WRITE, ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
ON_DESCRIPTOR(WRITE, ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
ON_DESCRIPTOR(WRITE, ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON_DESCRIPTOR(WRITE, ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
ON_DESCRIPTOR(WRITE, int, ftruncate, (int fd, off_t size), (fd, size))
ON_DESCRIPTOR(WRITE, int, ftruncate64, (int fd, off64_t size), (fd, size))
ON_DESCRIPTOR(READ, ssize_t, read, (int fd, void *data, size_t size), (fd, data, size))
ON_DESCRIPTOR(SYNC, int, fsync, (int fd), (fd))
ON_DESCRIPTOR(SYNC, int, fdatasync, (int fd), (fd))

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))
#define OPENS(name, first, call) \
    int name first { \
        mode_t mode = 0; \
        if (flags & O_CREAT) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); } \
        REAL(name); \
        return WRITES(flags) && fails(OPEN, path) ? -1 : real call; \
    }

OPENS(open, (const char *path, int flags, ...), (path, flags, mode))
OPENS(open64, (const char *path, int flags, ...), (path, flags, mode))
OPENS(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPENS(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))

FILE *fopen(const char *path, const char *kind) { REAL(fopen); return *kind != 'r' && fails(OPEN, path) ? NULL : real(path, kind); }
FILE *fopen64(const char *path, const char *kind) { REAL(fopen64); return *kind != 'r' && fails(OPEN, path) ? NULL : real(path, kind); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails(OPEN, path) ? -1 : real(path, mode); }
int rename(const char *from, const char *path) { REAL(rename); return fails(RENAME, path) ? -1 : real(from, path); }
int unlink(const char *path) { REAL(unlink); return mask & RENAME && error == EROFS && fails(RENAME, path) ? -1 : real(path); }
