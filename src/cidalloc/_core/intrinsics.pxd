# C for which Cython has no syntax: bit operations, the order of stores, attributes and pragmas.

from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #define high_bit(x) (63 - __builtin_clzll(x))
    #define low_bit(x) __builtin_ctzll(x)
    #define count_bits(x) ((uint64_t)__builtin_popcountll(x))
    #define read_once(p) __atomic_load_n(p, __ATOMIC_RELAXED)
    #define prefetch(p) __builtin_prefetch(p, 1)
    #define keep_order() __atomic_signal_fence(__ATOMIC_SEQ_CST)
    #define keep_order_of(block) __asm__ volatile("" : "+m"(*(block)))
    static __attribute__((cold, noinline, unused)) void new_peak(uint64_t *peak, int64_t *below) {
        *peak -= *below;
        *below = 0;
    }
    static inline void count_up(uint64_t *out, uint64_t from, uint64_t n) {
        #pragma GCC unroll 8  /* twice as fast */
        for (uint64_t i = 0; i < n; i++) out[i] = from + i;
    }
    """
    bint likely(bint x) noexcept nogil
    bint unlikely(bint x) noexcept nogil
    int high_bit(uint64_t x) noexcept nogil
    int low_bit(uint64_t x) noexcept nogil
    uint64_t count_bits(uint64_t x) noexcept nogil
    uint64_t read_once(const uint64_t *p) noexcept nogil
    void prefetch(const void *p) noexcept nogil
    # The compiler moves no store across this; and no store to this one block.
    void keep_order() noexcept nogil
    void keep_order_of(void *block) noexcept nogil
    void new_peak(uint64_t *peak, int64_t *below) noexcept nogil
    void count_up(uint64_t *out, uint64_t start, uint64_t n) noexcept nogil
