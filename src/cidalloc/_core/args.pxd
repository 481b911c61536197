# Read Python arguments as C values. A wrong type or value raises `InvalidArgument`.

from cpython.buffer cimport (PyBUF_FORMAT, PyBUF_ND, PyBUF_WRITABLE, PyBuffer_Release,
                             PyObject_CheckBuffer, PyObject_GetBuffer)
from cpython.long cimport PyLong_CheckExact
from cpython.number cimport PyNumber_Index
from cpython.object cimport PyObject
from cpython.sequence cimport PySequence_Check
from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint32_t, uint64_t, uintptr_t

from .intrinsics cimport high_bit, likely
from .messages cimport at_position, error
from .pool cimport INVALID_ARGUMENT, MAX_OWNERS

cdef extern from *:
    """
    /* Read a positive int of one digit without a call; some other ints may be read, too. */
    static inline int small_int(PyObject *x, int64_t *value) {
    #if PY_VERSION_HEX >= 0x030C0000
        #define HAS_ONE_DIGIT(x) PyUnstable_Long_IsCompact((PyLongObject *)x)
        #define DIGIT(x) PyUnstable_Long_CompactValue((PyLongObject *)x)
    #else
        #define HAS_ONE_DIGIT(x) (Py_SIZE(x) == 1)
        #define DIGIT(x) ((PyLongObject *)x)->ob_digit[0]
    #endif
        if (__builtin_expect(!PyLong_CheckExact(x) || !HAS_ONE_DIGIT(x), 0)) return 0;
        *value = DIGIT(x);
        return 1;
    }
    /* Return the value of an int that fits, or -1 for any other object. Both need no reference. */
    static __attribute__((noinline, unused)) int64_t long_value(PyObject *x) {
        int overflow;
        return PyLong_CheckExact(x) ? PyLong_AsLongLongAndOverflow(x, &overflow) : -1;
    }
    static inline int64_t int_value(PyObject *x) {
        int64_t value;
        return small_int(x, &value) ? value : long_value(x);
    }
    """
    bint small_int(object x, int64_t *value) noexcept
    int64_t int_value(PyObject *x) noexcept

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object x, int *overflow) except? -1

cdef enum:  # what read_int() found
    FITS = 0
    TOO_LARGE = 1
    NO_INT = 2


cdef inline bint is_zero(object x) noexcept:
    # CPython has one object for the int 0, which is the default of most arguments.
    return x is 0


cdef inline int read_int(object x, int64_t *value) except -1:
    cdef int overflow = 0
    if small_int(x, value):
        return FITS
    if not PyLong_CheckExact(x):
        if type(x).__name__ in ("bool", "bool_"):   # of Python or NumPy: not a number here
            return NO_INT
        try:
            x = PyNumber_Index(x)
        except TypeError:
            return NO_INT
    value[0] = PyLong_AsLongLongAndOverflow(x, &overflow)
    return TOO_LARGE if overflow else FITS


cdef inline int64_t as_int(object x, int64_t low, int64_t high, const char *name) except? -1:
    cdef int64_t value = 0
    cdef int kind = read_int(x, &value)
    if kind == NO_INT:
        raise error(INVALID_ARGUMENT, f"{name.decode()} must be an int, not {type(x).__name__}")
    if kind == TOO_LARGE or not low <= value <= high:
        raise error(INVALID_ARGUMENT, f"{name.decode()} must be between {low} and {high}")
    return value


cdef inline int64_t as_time(object x, const char *name) except? -1:
    cdef int64_t value = 0 if is_zero(x) else int_value(<PyObject *>x)
    return value if likely(value >= 0) else as_int(x, INT64_MIN, INT64_MAX, name)


cdef inline uint32_t as_owner(object x) except? 0xFFFFFFFF:
    cdef uint64_t value = 0 if is_zero(x) else int_value(<PyObject *>x)
    return value if likely(value < MAX_OWNERS) else as_int(x, 0, MAX_OWNERS - 1, "owner")


cdef inline int check_timeout(object x) except -1:
    if not isinstance(x, (int, float)) or isinstance(x, bool) or not x >= 0:
        raise error(INVALID_ARGUMENT, f"timeout must be seconds, at least 0, not {x!r}")
    return 0


cdef inline uint32_t as_shift(object block, int64_t capacity) except? 0xFFFFFFFF:
    # A small pool of wide blocks is exhausted while few IDs are held; a large pool has room.
    if block is None:
        return 0 if capacity < 1 << 16 else 6
    cdef int64_t width = as_int(block, 1, 64, "block")
    if width & (width - 1):
        raise error(INVALID_ARGUMENT, "block must be 1, 2, 4, 8, 16, 32 or 64")
    return high_bit(width)


cdef inline int64_t as_capacity(object x) except? 0:
    return as_int(x, 1, <int64_t>1 << 38, "capacity")


cdef inline int64_t as_cid(object x, object position=None) except? 0:
    # An int that does not fit becomes 0, which is in no pool.
    cdef int64_t value = 0
    cdef int kind = read_int(x, &value)
    if kind == NO_INT:
        raise error(INVALID_ARGUMENT, f"an ID must be an int, not {type(x).__name__}"
                                      f"{at_position(position)}")
    return value if kind == FITS else 0


cdef inline object ids_array(object ids):
    # Convert any other form of IDs to a uint64 array. A number that does not fit becomes 0, which
    # is in no pool.
    import numpy as np
    if not PyObject_CheckBuffer(ids):
        if not PySequence_Check(ids):
            raise error(INVALID_ARGUMENT, "ids must be an array or a sequence of ints, "
                                          f"not {type(ids).__name__}")
        return np.array([max(as_cid(cid, i), 0) for i, cid in enumerate(ids)], np.uint64)
    array = np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise error(INVALID_ARGUMENT, "ids must be a one-dimensional array of integers, "
                                      f"not {array.ndim}-dimensional {array.dtype}")
    if array.dtype.kind == "i":
        array = np.where(array < 0, 0, array)
    return np.require(array, np.uint64, "CA")


cdef inline bint view_ids(object array, Py_buffer *view, int flags) except -1:
    # Open a view of an aligned contiguous one-dimensional uint64 array; return False for any other.
    try:
        PyObject_GetBuffer(array, view, flags | PyBUF_FORMAT | PyBUF_ND)
    except (BufferError, TypeError, ValueError):
        return False
    if (view.ndim == 1 and view.itemsize == 8 and view.format != NULL
            and view.format[0] in b"LQ" and view.format[1] == 0 and not <uintptr_t>view.buf & 7):
        return True
    PyBuffer_Release(view)
    return False


cdef inline tuple sorted_ids(object ids):
    # Return a copy of the IDs, the same in ascending order, and how many come before the first that
    # is given twice: uint64 arrays, which no other thread changes.
    import numpy as np
    cdef Py_buffer view
    if view_ids(ids, &view, 0):
        PyBuffer_Release(&view)
    else:
        ids = ids_array(ids)
    array = np.array(ids, np.uint64)
    order = np.argsort(array, kind="stable")
    ascending = array[order]
    twice = order[1:][ascending[1:] == ascending[:-1]]
    return array, ascending, twice.min() if twice.size else array.size


cdef inline int view_memory(object buffer, Py_buffer *view, uint64_t size) except -1:
    # Open a view of memory for blocks.
    try:
        PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE)
    except (BufferError, TypeError, ValueError):
        raise error(INVALID_ARGUMENT, "buffer must be writable and contiguous") from None
    if <uint64_t>view.len < size or <uintptr_t>view.buf & 7:
        PyBuffer_Release(view)
        raise error(INVALID_ARGUMENT,
                    f"buffer must have at least {size} bytes and be 8-byte aligned")
    return 0
