"""Build script of the extension module ``aioummu._engine``.

The embedded engine is C without Python, so that its thread never needs the
interpreter. Each call below runs without the GIL.
"""

from cffi import FFI

ffibuilder = FFI()

ffibuilder.cdef(
    """
    struct aioummu_support {
        int error;
        int through_device;
        int files;
        uint64_t features;
    };

    struct aioummu_refusal {
        uint64_t start;
        uint64_t end;
    };

    void aioummu_probe(struct aioummu_support *support);
    const uint64_t *aioummu_activity(void);
    int aioummu_open(int doorbell[2]);
    int aioummu_register(int notifier, uint64_t start, uint64_t end,
                         uint64_t cookie, uint32_t wanted, bool once,
                         struct aioummu_refusal *refusal);
    int aioummu_unregister(int notifier, uint64_t cookie);
    int aioummu_spent(int notifier, uint64_t cookie);
    int aioummu_rearm(int notifier, uint64_t cookie,
                      struct aioummu_refusal *refusal);
    int aioummu_state(int notifier, uint64_t cookie, uint64_t *state);
    ssize_t aioummu_read(int notifier, void *buffer, size_t size);
    int aioummu_generation(int notifier, uint64_t *generation);
    int aioummu_fence(void);
    int aioummu_forward(int notifier, int socket);
    int aioummu_flush(int notifier);
    void aioummu_close(int notifier);

    #define AIOUMMU_MAX_REGIONS ...
    """
)

_SOURCES = [
    "engine/engine.c",
    "engine/forward.c",
    "engine/mappings.c",
    "engine/ranges.c",
    "engine/threads.c",
]
_HEADERS = [
    "engine/descriptor.h",
    "engine/engine.h",
    "engine/mappings.h",
    "engine/ranges.h",
    "engine/threads.h",
]

ffibuilder.set_source(
    "aioummu._engine",
    '#include "engine.h"',
    sources=_SOURCES,
    include_dirs=["engine", "kmod/include/uapi"],
    depends=[*_HEADERS, "kmod/include/uapi/linux/ummunotify.h"],
    extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"],
    # The engine's thread must not be the first to call a function of another
    # library: the dynamic linker could take a lock or allocate then.
    extra_link_args=["-Wl,-z,now"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
