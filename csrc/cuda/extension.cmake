# The extension _cuda: fatbins by nvcc, called directly, linked with a private CUDA runtime. After toolkit.cmake.
foreach(name ${OMITTED})
  omit(${name} "${REASON_${name}}")
endforeach()

set(NVCC_FLAGS "-std=c++17 -O3 -DNDEBUG -cudart static -Xcompiler=-fPIC,-fvisibility=hidden")
if("$ENV{CONVMIXER_FAST_WERROR}")
  string(APPEND NVCC_FLAGS " -Werror all-warnings -Xcompiler=-Wall,-Wextra")
endif()
set(nvcc ${NVCC})
if(ASKED_COMPILER)
  # Without CXX the host compiler is nvcc's choice, which NVCC_CCBIN changes.
  list(APPEND nvcc -ccbin ${CMAKE_CXX_COMPILER})
endif()

# nvcc compiles for several architectures at a time: one source has the machine for itself.
set_property(GLOBAL PROPERTY JOB_POOLS nvcc=1)
set(threads "$ENV{MAX_JOBS}")
if(NOT threads)
  cmake_host_system_information(RESULT threads QUERY NUMBER_OF_LOGICAL_CORES)
endif()

# compile(SOURCE FLAG...) appends the object of a source to OBJECTS.
#
# CONVMIXER_FAST_BUILD_CACHE keeps it under a hash of everything that the object depends on, so that an
# object which is there is right, for another checkout too. CUTLASS counts by its version, not its path.
function(compile source)
  set(source ${CMAKE_SOURCE_DIR}/${source})
  cmake_path(GET source STEM stem)
  set(object ${CMAKE_BINARY_DIR}/${stem}.o)
  separate_arguments(flags UNIX_COMMAND "${NVCC_FLAGS}")
  list(APPEND flags ${ARGN})
  if(NOT "$ENV{CONVMIXER_FAST_BUILD_CACHE}" STREQUAL "")
    set(key "${NVCC_VERSION};${COMPILER_VERSION};$ENV{NVCC_APPEND_FLAGS};${flags}")
    file(GLOB inputs ${CMAKE_SOURCE_DIR}/*.h ${CMAKE_SOURCE_DIR}/common/*.h ${CMAKE_SOURCE_DIR}/cuda/*.*h)
    list(APPEND inputs ${source})
    if(CUTLASS IN_LIST flags)
      string(REPLACE "${CUTLASS}" "" key "${key}")
      list(APPEND inputs ${CUTLASS}/cutlass/version.h)
    endif()
    foreach(input ${inputs})
      file(SHA256 ${input} hash)
      list(APPEND key ${hash})
    endforeach()
    string(SHA256 hash "${key}")
    string(SUBSTRING ${hash} 0 24 hash)
    get_filename_component(
      folder "$ENV{CONVMIXER_FAST_BUILD_CACHE}" ABSOLUTE BASE_DIR ${CMAKE_SOURCE_DIR}/..)
    file(MAKE_DIRECTORY ${folder})
    set(object ${folder}/${stem}-${hash}.o)
  endif()
  set(OBJECTS ${OBJECTS} ${object} PARENT_SCOPE)
  if(NOT folder OR NOT EXISTS ${object})
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${nvcc} -MMD -MF ${stem}.d ${flags} --threads ${threads} -c ${source} -o ${object}
      DEPENDS ${source} DEPFILE ${stem}.d JOB_POOL nvcc COMMENT "nvcc ${object}" VERBATIM)
  endif()
endfunction()

foreach(architecture ${REAL})
  list(APPEND gencode -gencode=arch=compute_${architecture},code=sm_${architecture})
endforeach()
foreach(architecture ${VIRTUAL})
  list(APPEND gencode -gencode=arch=compute_${architecture},code=compute_${architecture})
endforeach()
compile(cuda/pointwise_mma.cu ${gencode})
set(kernels "[\"mma.sync\"]")
if(CUTLASS)
  # Compiled for sm_90a alone: its instructions exist nowhere else. -isystem: no warnings about CUTLASS.
  compile(cuda/pointwise_wgmma.cu
    -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -isystem ${CUTLASS})
  set(kernels "[\"mma.sync\", \"wgmma\"]")
  set(HAVE_WGMMA "#define CONVMIXER_FAST_HAVE_WGMMA 1")
endif()

list(TRANSFORM REAL PREPEND sm_)
list(TRANSFORM VIRTUAL PREPEND compute_)
list(JOIN REAL " " built_for)
foreach(architecture ${VIRTUAL})
  string(APPEND built_for " ${architecture}")
endforeach()
string(REPLACE " " "\", \"" array "${built_for}")
string(JSON INFO SET "${INFO}" architectures "[\"${array}\"]")
string(JSON INFO SET "${INFO}" kernels "${kernels}")
record("${NVCC_VERSION}" compiler)
record("${NVCC_FLAGS}" flags)
file(CONFIGURE OUTPUT build_config.h @ONLY CONTENT [[
#pragma once
#define CONVMIXER_FAST_VERSION "@VERSION@"
#define CONVMIXER_FAST_NVCC "@NVCC_VERSION@"
#define CONVMIXER_FAST_ARCHITECTURES "@built_for@"
@HAVE_WGMMA@
]])

# The CUDA runtime in it is a private copy: torch has one of its own.
list(JOIN nvcc "\" \"" nvcc)
set(CMAKE_CXX_CREATE_SHARED_MODULE
  "\"${nvcc}\" -shared -cudart static -Xlinker=--exclude-libs=ALL,-s <OBJECTS> -o <TARGET>")
add_extension(bindings/cuda.cpp ${OBJECTS})
