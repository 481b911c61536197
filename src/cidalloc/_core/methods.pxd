# Put C functions in the place of methods of a class.

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
