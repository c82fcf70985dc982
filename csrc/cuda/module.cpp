// The Python module that carries the kernels: what they are made of, and for what.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) {
  m.attr("sources") = M3BIND_SOURCES;  // m3bind/sources.py
  m.attr("architectures") = pybind11::make_tuple("sm_90");
  m.attr("operators") =
      pybind11::make_tuple("similarity_stats", "siglip", "similarity_topk");  // primitives
}
