/* Fails the n-th call of the system or of malloc: preloaded into a process, see failing.py.
 *
 * Counted are calls on files below the watched paths, and calls of the extension modules for memory.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PATHS = 8, FDS = 4096, ERRORS = 3 };

static struct {
    long left;          /* calls before the one that fails; below 0 nothing is counted */
    int for_ever;       /* the calls after it fail, too */
    int which;          /* of the errors that a call may have */
    int failed;
    const char *last;   /* the name of the call that failed first */
} state = {.left = -1, .last = ""};

static const char *paths[PATHS];
static char watched[FDS];

void failing_watch(const char *path) {
    for (int i = 0; i < PATHS; i++)
        if (!paths[i]) { paths[i] = strdup(path); return; }
    abort();
}

void failing_begin(long before, int for_ever, int which) {
    state.for_ever = for_ever;
    state.which = which;
    state.failed = 0;
    state.last = "";
    state.left = before;
}

int failing_end(void) {
    state.left = -1;
    return state.failed;
}

const char *failing_last(void) { return state.last; }

/* Count a call; return the number of the error with which it has to fail, or 0. */
static int fails(const char *name, int first, int second, int interrupted) {
    const int errors[ERRORS] = {first, second, interrupted ? EINTR : 0};
    if (state.left < 0 || !errors[state.which]) return 0;
    if (state.left > 0) { state.left--; return 0; }
    if (state.failed && !state.for_ever) return 0;
    if (!state.failed++) state.last = name;
    return errors[state.which];
}

static int is_path(const char *path) {
    for (int i = 0; path && i < PATHS && paths[i]; i++)
        if (!strncmp(path, paths[i], strlen(paths[i]))) return 1;
    return 0;
}

static int is_fd(int fd) { return fd >= 0 && fd < FDS && watched[fd]; }

static int is_ours(void *caller) {
    Dl_info info;
    return state.left >= 0 && dladdr(caller, &info) && info.dli_fname
        && strstr(info.dli_fname, "/cidalloc/");
}

#define NEXT(name) static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name)

#define FAIL(interest, name, first, second, interrupted, result) do { \
        int error_ = (interest) ? fails(name, first, second, interrupted) : 0; \
        if (error_) { errno = error_; return result; } \
    } while (0)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        NEXT(name); \
        FAIL(is_path(path), "open", EMFILE, flags & O_CREAT ? ENOSPC : EIO, 1, -1); \
        int fd = next(path, flags, mode); \
        if (fd >= 0 && fd < FDS) watched[fd] = is_path(path); \
        return fd; \
    }
OPEN(open)
OPEN(open64)

int close(int fd) {
    NEXT(close);
    int interest = is_fd(fd);
    if (interest) watched[fd] = 0;
    int result = next(fd);      /* whatever it returns, the descriptor is gone */
    FAIL(interest, "close", EIO, EINTR, 0, -1);
    return result;
}

/* A call on a descriptor, or on a path. */
#define CALL(type, name, shown, interest, parameters, arguments, first, second, interrupted, result) \
    type name parameters { \
        NEXT(name); \
        FAIL(interest, shown, first, second, interrupted, result); \
        return next arguments; \
    }
#define ON_FD(type, name, shown, parameters, arguments, first, second) \
    CALL(type, name, shown, is_fd(fd), parameters, arguments, first, second, 1, -1)
#define ON_PATH(name, shown, parameters, arguments, first, second) \
    CALL(int, name, shown, is_path(path), parameters, arguments, first, second, 0, -1)

ON_FD(ssize_t, read, "read", (int fd, void *to, size_t n), (fd, to, n), EIO, EIO)
ON_FD(ssize_t, pread64, "pread", (int fd, void *to, size_t n, off64_t at), (fd, to, n, at), EIO, EIO)
ON_FD(ssize_t, preadv64v2, "pread", (int fd, const struct iovec *to, int n, off64_t at, int flags),
      (fd, to, n, at, flags), EIO, ENOMEM)
ON_FD(ssize_t, preadv64, "pread", (int fd, const struct iovec *to, int n, off64_t at),
      (fd, to, n, at), EIO, ENOMEM)
ON_FD(ssize_t, write, "write", (int fd, const void *from, size_t n), (fd, from, n), ENOSPC, EIO)
ON_FD(ssize_t, pwrite64, "pwrite", (int fd, const void *from, size_t n, off64_t at),
      (fd, from, n, at), ENOSPC, EIO)
ON_FD(int, fsync, "fsync", (int fd), (fd), EIO, EDQUOT)
ON_FD(int, fdatasync, "fsync", (int fd), (fd), EIO, EDQUOT)
ON_FD(int, ftruncate64, "ftruncate", (int fd, off64_t n), (fd, n), EIO, EFBIG)
ON_FD(int, fstat64, "stat", (int fd, struct stat64 *to), (fd, to), EIO, ENOMEM)
CALL(off64_t, lseek64, "lseek", is_fd(fd), (int fd, off64_t at, int whence), (fd, at, whence), EIO,
     EINVAL, 0, -1)
ON_PATH(stat64, "stat", (const char *path, struct stat64 *to), (path, to), EIO, ENOMEM)
ON_PATH(lstat64, "stat", (const char *path, struct stat64 *to), (path, to), EIO, ENOMEM)
CALL(int, fstatat64, "stat", is_path(path), (int at, const char *path, struct stat64 *to, int flags),
     (at, path, to, flags), EIO, ENOMEM, 0, -1)
ON_PATH(link, "link", (const char *path, const char *to), (path, to), ENOSPC, EPERM)
CALL(int, linkat, "link", is_path(path), (int at, const char *path, int in, const char *to, int flags),
     (at, path, in, to, flags), ENOSPC, EPERM, 0, -1)
ON_PATH(rename, "rename", (const char *path, const char *to), (path, to), ENOSPC, EIO)
ON_PATH(unlink, "unlink", (const char *path), (path), EIO, EROFS)
CALL(int, unlinkat, "unlink", is_path(path), (int at, const char *path, int flags),
     (at, path, flags), EIO, EROFS, 0, -1)
ON_PATH(mkdir, "mkdir", (const char *path, mode_t mode), (path, mode), ENOSPC, EROFS)
ON_PATH(rmdir, "rmdir", (const char *path), (path), EIO, EROFS)
CALL(DIR *, opendir, "opendir", is_path(path), (const char *path), (path), EMFILE, EIO, 0, NULL)

int posix_fallocate64(int fd, off64_t at, off64_t n) {
    NEXT(posix_fallocate64);
    int error = is_fd(fd) ? fails("fallocate", ENOSPC, EIO, 1) : 0;
    return error ? error : next(fd, at, n);
}

int fcntl64(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    NEXT(fcntl64);
    int locks = command == F_OFD_SETLK || command == F_OFD_GETLK || command == F_SETLK;
    FAIL(is_fd(fd) && locks, "lock", ENOLCK, EIO, 1, -1);
    return next(fd, command, argument);
}

/* Memory for the extension modules. */

void *mmap64(void *at, size_t size, int access, int flags, int fd, off64_t offset) {
    NEXT(mmap64);
    FAIL(is_ours(__builtin_return_address(0)), "mmap", ENOMEM, EAGAIN, 0, MAP_FAILED);
    return next(at, size, access, flags, fd, offset);
}

int mprotect(void *at, size_t size, int access) {
    NEXT(mprotect);
    FAIL(is_ours(__builtin_return_address(0)), "mprotect", ENOMEM, EACCES, 0, -1);
    return next(at, size, access);
}

int madvise(void *at, size_t size, int advice) {
    NEXT(madvise);
    FAIL(is_ours(__builtin_return_address(0)), "madvise", ENOMEM, EAGAIN, 0, -1);
    return next(at, size, advice);
}

void *mremap(void *at, size_t from, size_t to, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    void *place = va_arg(rest, void *);
    va_end(rest);
    NEXT(mremap);
    FAIL(is_ours(__builtin_return_address(0)), "mremap", ENOMEM, EAGAIN, 0, MAP_FAILED);
    return next(at, from, to, flags, place);
}

/* Not by dlsym, which may need memory itself. */
extern void *__libc_malloc(size_t size);

void *malloc(size_t size) {
    FAIL(state.left >= 0 && is_ours(__builtin_return_address(0)), "malloc", ENOMEM, ENOMEM, 0, NULL);
    return __libc_malloc(size);
}
