"""Build script of the extension module ``aioummu._ummunotify_abi``.

The driver's UAPI header is the only place that knows the numbers of the
interface: the C compiler reads them there, and cffi checks the structures
declared below against it, field by field.
"""

from cffi import FFI

ffibuilder = FFI()

ffibuilder.cdef(
    """
    #define UMMUNOTIFY_EXCHANGE_FEATURES ...
    #define UMMUNOTIFY_REGISTER_REGION ...
    #define UMMUNOTIFY_UNREGISTER_REGION ...
    #define UMMUNOTIFY_GENERATION_OFFSET ...
    #define UMMUNOTIFY_GENERATION_SIZE ...

    #define UMMUNOTIFY_EVENT_TYPE_INVAL ...
    #define UMMUNOTIFY_EVENT_TYPE_LAST ...
    #define UMMUNOTIFY_FEATURE_CAUSE ...
    #define UMMUNOTIFY_FEATURE_FILTER ...
    #define UMMUNOTIFY_FEATURE_STATE ...
    #define UMMUNOTIFY_FEATURE_ONCE ...
    #define UMMUNOTIFY_REGION_CAUSE_MASK ...
    #define UMMUNOTIFY_REGION_FLAG_ONCE ...
    #define UMMUNOTIFY_STATE_OFFSET ...
    #define UMMUNOTIFY_EVENT_FLAG_HINT ...
    #define UMMUNOTIFY_EVENT_CAUSE_UNMAP ...
    #define UMMUNOTIFY_EVENT_CAUSE_CLEAR ...
    #define UMMUNOTIFY_EVENT_CAUSE_PROTECT_MAPPING ...
    #define UMMUNOTIFY_EVENT_CAUSE_PROTECT_PAGE ...
    #define UMMUNOTIFY_EVENT_CAUSE_SOFT_DIRTY ...
    #define UMMUNOTIFY_EVENT_CAUSE_MIGRATE ...
    #define UMMUNOTIFY_EVENT_CAUSE_EXCLUSIVE ...
    #define UMMUNOTIFY_EVENT_CAUSE_END ...
    #define UMMUNOTIFY_EVENT_CAUSE_MOVE ...
    #define UMMUNOTIFY_EVENT_CAUSE_FOREIGN ...

    struct ummunotify_register_ioctl {
        uint64_t start;
        uint64_t end;
        uint64_t user_cookie;
        uint32_t flags;
        uint32_t reserved;
    };

    struct ummunotify_event {
        uint32_t type;
        uint32_t flags;
        uint64_t hint_start;
        uint64_t hint_end;
        uint64_t user_cookie_counter;
    };

    uint64_t ummunotify_load_state(const void *states, uint32_t slot);

    #define AIOUMMU_PLAIN_LOAD_IS_ACQUIRE ...

    #define F_SETOWN_EX ...
    #define F_OWNER_TID ...
    int aioummu_signalfd(const int *signals, int count);
    ssize_t aioummu_read_nowait(int fd, void *buffer, size_t size);
    """
)

ffibuilder.set_source(
    "aioummu._ummunotify_abi",
    """
    #include <fcntl.h>
    #include <signal.h>
    #include <sys/signalfd.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>
    #include <linux/ummunotify.h>

    /*
     * Whether one plain 64-bit load is atomic and ordered before what follows
     * it: then Python reads the generation through a memoryview, several times
     * faster than a call into C.
     */
    #if defined(__x86_64__)
    #define AIOUMMU_PLAIN_LOAD_IS_ACQUIRE 1
    #else
    #define AIOUMMU_PLAIN_LOAD_IS_ACQUIRE 0
    #endif

    /* os.signalfd does not exist. */
    static int aioummu_signalfd(const int *signals, int count)
    {
        sigset_t mask;
        int i;

        sigemptyset(&mask);
        for (i = 0; i < count; i++)
            sigaddset(&mask, signals[i]);
        return signalfd(-1, &mask, SFD_NONBLOCK | SFD_CLOEXEC);
    }

    #ifndef RWF_NOWAIT
    #define RWF_NOWAIT 8
    #endif

    /* os.preadv() has no flags where Python was built for an older C library. */
    static ssize_t aioummu_read_nowait(int fd, void *buffer, size_t size)
    {
        struct iovec part = { buffer, size };

        return syscall(SYS_preadv2, fd, &part, 1, -1L, -1L, RWF_NOWAIT);
    }
    """,
    include_dirs=["kmod/include/uapi"],
    define_macros=[("_GNU_SOURCE", None)],
    depends=["kmod/include/uapi/linux/ummunotify.h"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
