# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds the extension module ``luksrotd.cryptsetup._ffi`` (cffi, API mode): for build time only.

The build backend takes ``ffibuilder`` or ``build``; ``python luksrotd/cryptsetup/ffi_build.py`` puts the module beside
this file, for work in the source tree.  The declarations are written by hand from the headers and the man pages; the C
compiler checks them against the headers.
"""

import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from cffi import FFI

#: Every supported Python has the stable ABI that cffi's C code keeps to.
MODULE_FILE = "_ffi.abi3.so"
LIBRARIES = ["cryptsetup", "seccomp"]

LIBCRYPTSETUP = """
#define CRYPT_ANY_SLOT ...
#define CRYPT_DEBUG_NONE ...
#define CRYPT_LOG_ERROR ...
#define CRYPT_PBKDF_NO_BENCHMARK ...

struct crypt_device;
struct crypt_keyslot_context;

struct crypt_pbkdf_type {
    const char *type;
    const char *hash;
    uint32_t time_ms;
    uint32_t iterations;
    uint32_t max_memory_kb;
    uint32_t parallel_threads;
    uint32_t flags;
};

typedef enum { CRYPT_SLOT_INACTIVE, CRYPT_SLOT_ACTIVE, CRYPT_SLOT_ACTIVE_LAST, ... } crypt_keyslot_info;

typedef struct {
    const char *name;
    int (*open)(struct crypt_device *cd, int token, char **buffer, size_t *buffer_len, void *user);
    void (*buffer_free)(void *buffer, size_t buffer_len);
    ...;
} crypt_token_handler;

extern "Python" void luksrotd_log(int level, const char *message, void *user);
extern "Python" int luksrotd_token_open(struct crypt_device *cd, int token, char **buffer, size_t *buffer_len,
                                        void *user);
extern "Python" void luksrotd_token_free(void *buffer, size_t buffer_len);

void crypt_set_log_callback(struct crypt_device *cd, void (*log)(int, const char *, void *), void *user);
void crypt_set_debug_level(int level);
void crypt_token_external_disable(void);

int crypt_init(struct crypt_device **cd, const char *device);
int crypt_load(struct crypt_device *cd, const char *type, void *params);
void crypt_free(struct crypt_device *cd);
int crypt_dump_json(struct crypt_device *cd, const char **json, uint32_t flags);

const struct crypt_pbkdf_type *crypt_get_pbkdf_type_params(const char *type);
int crypt_set_pbkdf_type(struct crypt_device *cd, const struct crypt_pbkdf_type *pbkdf);

int crypt_get_volume_key_size(struct crypt_device *cd);
int crypt_volume_key_verify(struct crypt_device *cd, const char *key, size_t key_size);
int crypt_volume_key_get(struct crypt_device *cd, int keyslot, char *key, size_t *key_size,
                         const char *passphrase, size_t passphrase_size);
int crypt_activate_by_passphrase(struct crypt_device *cd, const char *name, int keyslot,
                                 const char *passphrase, size_t passphrase_size, uint32_t flags);

int crypt_keyslot_max(const char *type);
crypt_keyslot_info crypt_keyslot_status(struct crypt_device *cd, int keyslot);
int crypt_keyslot_area(struct crypt_device *cd, int keyslot, uint64_t *offset, uint64_t *length);
int crypt_keyslot_add_by_volume_key(struct crypt_device *cd, int keyslot, const char *key, size_t key_size,
                                    const char *passphrase, size_t passphrase_size);
int crypt_keyslot_destroy(struct crypt_device *cd, int keyslot);

int crypt_token_register(const crypt_token_handler *handler);
int crypt_keyslot_context_init_by_volume_key(struct crypt_device *cd, const char *key, size_t key_size,
                                             struct crypt_keyslot_context **context);
int crypt_keyslot_context_init_by_token(struct crypt_device *cd, int token, const char *type, const char *pin,
                                        size_t pin_size, void *user, struct crypt_keyslot_context **context);
void crypt_keyslot_context_free(struct crypt_keyslot_context *context);
int crypt_keyslot_add_by_keyslot_context(struct crypt_device *cd,
                                         int keyslot_existing, struct crypt_keyslot_context *existing,
                                         int keyslot_new, struct crypt_keyslot_context *added, uint32_t flags);
int crypt_volume_key_get_by_keyslot_context(struct crypt_device *cd, int keyslot, char *key, size_t *key_size,
                                            struct crypt_keyslot_context *context);

int crypt_token_json_get(struct crypt_device *cd, int token, const char **json);
int crypt_token_json_set(struct crypt_device *cd, int token, const char *json);

void *crypt_safe_alloc(size_t size);
void *crypt_safe_realloc(void *data, size_t size);
void crypt_safe_free(void *data);
void crypt_safe_memzero(void *data, size_t size);
"""

#: System calls that Python 3.11 does not offer (or, as os.getrandom, only with a copy of the bytes that stays behind).
LINUX = """
#define CLONE_NEWIPC ...
#define CLONE_NEWNET ...
#define CLONE_NEWUTS ...
#define PR_SET_DUMPABLE ...
#define PR_SET_NO_NEW_PRIVS ...
#define PR_SET_PDEATHSIG ...

int prctl(int option, ...);
int unshare(int flags);
ssize_t getrandom(void *buffer, size_t length, unsigned int flags);
"""

#: libseccomp (>= 2.5) for the filter of system calls, and Landlock, for which the C library has no functions.
SANDBOX = """
#define LUKSROTD_ACT_ENOSYS ...
#define SCMP_ACT_ALLOW ...
#define SCMP_CMP_MASKED_EQ ...
#define SCMP_FLTATR_API_SYSRAWRC ...
#define SCMP_ARCH_S390 ...
#define SCMP_ARCH_S390X ...
#define SCMP_ARCH_X86 ...
#define __NR_SCMP_ERROR ...

struct scmp_arg_cmp {
    unsigned int arg;
    int op;
    uint64_t datum_a;
    uint64_t datum_b;
    ...;
};

uint32_t seccomp_arch_native(void);
void *seccomp_init(uint32_t action);
void seccomp_release(void *filter);
int seccomp_attr_set(void *filter, int attribute, uint32_t value);
int seccomp_syscall_resolve_name(const char *name);
int seccomp_rule_add_array(void *filter, uint32_t action, int call, unsigned int count,
                           const struct scmp_arg_cmp *conditions);
int seccomp_load(void *filter);

#define LANDLOCK_CREATE_RULESET_VERSION ...
#define LANDLOCK_RULE_PATH_BENEATH ...
#define SYS_landlock_create_ruleset ...
#define SYS_landlock_add_rule ...
#define SYS_landlock_restrict_self ...

struct landlock_ruleset_attr {
    uint64_t handled_access_fs;
    ...;
};
struct landlock_path_beneath_attr {
    uint64_t allowed_access;
    int32_t parent_fd;
    ...;
};

long syscall(long number, ...);
"""

SOURCE = """
#include <errno.h>
#include <linux/landlock.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <libcryptsetup.h>
#include <seccomp.h>

#define LUKSROTD_ACT_ENOSYS SCMP_ACT_ERRNO(ENOSYS)
"""

ffibuilder = FFI()
ffibuilder.cdef(LIBCRYPTSETUP + LINUX + SANDBOX)
# Python.h comes before SOURCE and defines _GNU_SOURCE.
ffibuilder.set_source("luksrotd.cryptsetup._ffi", SOURCE, libraries=LIBRARIES)


def build(directory: Path) -> Path:
    """Compile the module into ``directory`` with the C compiler alone (no setuptools); its path.

    Heeds ``CC``, ``CFLAGS``, ``CPPFLAGS`` and ``LDFLAGS``.  Raises ``subprocess.CalledProcessError``.
    """
    flags = {name: shlex.split(os.environ.get(name, "")) for name in ("CPPFLAGS", "CFLAGS", "LDFLAGS")}
    compiler = shlex.split(os.environ.get("CC", "cc"))
    target = directory / MODULE_FILE
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "_ffi.c")
        ffibuilder.emit_c_code(str(source))
        built = Path(scratch, MODULE_FILE)
        include = f"-I{sysconfig.get_path('include')}"
        options = ["-O2", "-fPIC", "-shared", include, *flags["CPPFLAGS"], *flags["CFLAGS"], *flags["LDFLAGS"]]
        libraries = [f"-l{name}" for name in LIBRARIES]
        command = [*compiler, *options, str(source), *libraries, "-o", str(built)]
        subprocess.run(command, check=True)
        # Not in place: a process that has the old module mapped must keep its old file.
        staged = target.with_suffix(".new")
        staged.write_bytes(built.read_bytes())
        staged.chmod(0o755)
        staged.replace(target)
    return target


if __name__ == "__main__":
    build(Path(__file__).resolve().parent)
