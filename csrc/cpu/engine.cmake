# The CPU engine, as the extension _cpu or in native_test.

# Compiled once for each instruction set: the sources in namespace CONVMIXER_FAST_ISA.
file(GLOB_RECURSE SOURCES CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/cpu/*.cpp)
foreach(source ${SOURCES})
  file(STRINGS ${source} kernel REGEX "^namespace.*CONVMIXER_FAST_ISA {")
  if(kernel)
    list(APPEND KERNELS ${source})
    list(REMOVE_ITEM SOURCES ${source})
  endif()
endforeach()

# Floats in a vector, and the compiler's flags, of each instruction set.
set(ISAS baseline avx2 avx512)
set(LANES_baseline 4)
set(FLAGS_baseline "")
set(LANES_avx2 8)
set(FLAGS_avx2 "-mavx2 -mfma")
set(LANES_avx512 16)
set(FLAGS_avx512 "-mavx2 -mfma -mavx512f -mavx512vl -mavx512dq -mavx512bw")
if(WIDE)
  set(ISAS baseline avx2)
  set(LANES_avx2 16)
  string(APPEND FLAGS_avx2 " -DCONVMIXER_FAST_WIDE -Wno-psabi")
endif()

# Sets `reason`: why there is no such instruction set; empty where there is.
function(try_flags flags)
  separate_arguments(flags)
  execute_process(
    COMMAND ${COMPILER} ${flags} -c ${CMAKE_BINARY_DIR}/isa.cpp -o ${CMAKE_BINARY_DIR}/isa.o
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  set(reason "" PARENT_SCOPE)
  if(status)
    string(REGEX MATCH "[^\n]*error[^\n]*" error "${output}")
    set(reason "the compiler refuses ${ARGV0}: ${error} (exit status ${status})" PARENT_SCOPE)
  endif()
endfunction()
file(WRITE ${CMAKE_BINARY_DIR}/isa.cpp "#ifndef __x86_64__\n#error not x86-64\n#endif\nint isa;\n")
try_flags("")
set(other_machine "${reason}")

string(JSON INFO SET "${INFO}" isas "{}")
foreach(isa ${ISAS})
  set(reason "")
  if(other_machine AND NOT isa STREQUAL "baseline")
    set(reason "the target is ${CMAKE_SYSTEM_PROCESSOR}, not x86-64")
  elseif(NOT isa STREQUAL "baseline")
    try_flags("${FLAGS_${isa}}")
  endif()
  if(reason)
    omit(${isa} "${reason}")
    continue()
  endif()
  string(JSON INFO SET "${INFO}" isas ${isa} "{\"lanes\": ${LANES_${isa}}}")
  record("${FLAGS_${isa}}" isas ${isa} flags)
  string(TOUPPER ${isa} name)
  string(APPEND HAVE "#define CONVMIXER_FAST_HAVE_${name} 1\n")
  string(APPEND EACH " CONVMIXER_FAST_ISA_FLAGS(\"${isa}\", \"${FLAGS_${isa}}\")")
  add_library(kernels_${isa} OBJECT ${KERNELS})
  target_compile_definitions(
    kernels_${isa} PRIVATE CONVMIXER_FAST_ISA=${isa} CONVMIXER_FAST_LANES=${LANES_${isa}})
  separate_arguments(flags UNIX_COMMAND "${FLAGS_${isa}}")
  target_compile_options(kernels_${isa} PRIVATE ${flags})
  list(APPEND SOURCES $<TARGET_OBJECTS:kernels_${isa}>)
endforeach()

record("${COMPILER_VERSION}" compiler)
record("${FLAGS}" flags)
# What the module knows about its own build.
file(CONFIGURE OUTPUT build_config.h @ONLY CONTENT [[
#pragma once
#define CONVMIXER_FAST_VERSION "@VERSION@"
#define CONVMIXER_FAST_COMPILER R"version(@COMPILER_VERSION@)version"
#define CONVMIXER_FAST_FLAGS R"flags(@FLAGS@)flags"
#define CONVMIXER_FAST_FOR_EACH_ISA@EACH@
@HAVE@]])

if(PART STREQUAL "_cpu")
  add_extension(${CMAKE_SOURCE_DIR}/bindings/cpu.cpp ${SOURCES})
else()
  enable_testing()
  add_subdirectory(${CMAKE_SOURCE_DIR}/../tests/native native)
endif()
