// What a call of a module would ask of Python's objects, whether it is like the last one, in one go.
//
// Asked in Python it is some hundred instructions of the interpreter for a block, and after a forward
// neither they nor the objects are in the caches. Nothing is kept here: tuples come in at every call, so
// that Python's collector sees all that they hold. What cannot be read is a change, not an error.
#pragma once

#include <pybind11/pybind11.h>

namespace convmixer_fast {

// Whether calls of these modules run what they ran, in eval mode, and nobody watches them.
//   modules: (module, its class, its children) each; acts: (module, its attribute `approximate` or None)
//   each; falsy: the names of what must be false or empty in a module; methods: the names that must not
//   be set on its object.
bool modules_unchanged(const pybind11::tuple& modules, const pybind11::tuple& acts,
                       const pybind11::tuple& falsy, const pybind11::tuple& methods);

// Whether parameters and settings of halves of blocks are what they were.
//   halves: (convolution, norm, values of the convolution's settings, eps) each; settings: their names;
//   stamps: (tensor, version, address, dtype, shape, strides) of each parameter and statistic of all
//   halves, or None: weight and bias of the convolution, those of the norm, its mean and variance.
bool parameters_unchanged(const pybind11::tuple& halves, const pybind11::tuple& settings,
                          const pybind11::tuple& stamps);

// Whether attributes of classes and modules, (owner, name, value) each, are the very objects they were.
bool attributes_unchanged(const pybind11::tuple& rows);

}  // namespace convmixer_fast
