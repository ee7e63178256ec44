// A symbol that glibc has since 2.32, for modules that run with older ones (GUT_FAST_GLIBC). GCC's C++ library reads it
// to leave out atomic instructions where a process has one thread; false is always right.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
