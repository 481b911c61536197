# Put C functions in the place of methods of a class, with the critical section of their object.

from cpython.object cimport PyObject

cdef extern from *:
    enum:
        METH_FASTCALL
        METH_KEYWORDS
    ctypedef void *PyCFunction
    ctypedef struct PyMethodDef:
        PyCFunction ml_meth
        int ml_flags
    ctypedef struct PyMethodDescrObject:
        PyMethodDef *d_method

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    #define section_t PyCriticalSection
    #define enter_section PyCriticalSection_Begin
    #define leave_section PyCriticalSection_End
    #else   /* the GIL does it */
    #define section_t char
    #define enter_section(section, object) (*(section) = 0)
    #define leave_section(section) ((void)(section))
    #endif
    """
    ctypedef struct Section "section_t":
        pass
    void enter_section(Section *section, PyObject *object) noexcept
    void leave_section(Section *section) noexcept

# A method with the flags METH_FASTCALL and METH_KEYWORDS: n positional arguments, then those that
# have the names.
ctypedef PyObject *(*Method)(PyObject *self, PyObject *const *args, Py_ssize_t n,
                             PyObject *names) noexcept


cdef inline Method replace(type cls, str name, Method quick) except NULL:
    # Put a function in the place of a method; return what was there.
    descriptor = vars(cls)[name]
    cdef PyMethodDef *method = (<PyMethodDescrObject *>descriptor).d_method
    cdef Method before = <Method>method.ml_meth
    if method.ml_flags == METH_FASTCALL | METH_KEYWORDS:
        method.ml_meth = <PyCFunction>quick
    return before
