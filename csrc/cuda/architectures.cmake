# What to compile for: a list in torch's words, such as "8.0;8.6+PTX", as what nvcc is told.

set(FIRST_ARCHITECTURE 80)  # the kernels' instructions begin there

# choose_architectures(ASKED KNOWN NVCC) sets
#   REAL, VIRTUAL  for which architectures to compile machine code, and PTX: "80" and so on
#   WGMMA          whether 9.0a is asked for: on it the kernels but CUTLASS's are the same as on 9.0
#   OMITTED        the names of what is left out, with REASON_<name>
#   REASON         what is wrong with the list; empty where nothing is
function(choose_architectures asked known nvcc)
  set(names Ampere+Tegra Ampere Ada Hopper Blackwell+Tegra Blackwell)
  set(numbers 8.7 "8.0 8.6+PTX" 8.9+PTX 9.0+PTX 11.0 "10.0 10.3 12.0 12.1+PTX")
  foreach(name number IN ZIP_LISTS names numbers)
    string(REPLACE ${name} ${number} asked "${asked}")
  endforeach()
  string(STRIP "${asked}" asked)
  string(REGEX REPLACE "[;, \t\n]+" ";" asked "${asked}")
  string(REPLACE ";" ", " names "${names}")
  set(WGMMA FALSE)
  foreach(entry IN LISTS asked)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      set(REASON "'${entry}' is none: architectures are as 8.0, 9.0a, 12.0+PTX, ${names}" PARENT_SCOPE)
      return()
    endif()
    set(number ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
    set(name sm_${number}${CMAKE_MATCH_3})
    if(number LESS FIRST_ARCHITECTURE)
      set(REASON_${name} "the kernels begin at sm_${FIRST_ARCHITECTURE}" PARENT_SCOPE)
      list(APPEND OMITTED ${name})
    elseif(NOT number IN_LIST known)
      set(REASON_${name} "${nvcc} does not know it" PARENT_SCOPE)
      list(APPEND OMITTED ${name})
    else()
      list(APPEND REAL ${number})
      if(CMAKE_MATCH_4)
        list(APPEND VIRTUAL ${number})
      endif()
      if(name STREQUAL "sm_90a")
        set(WGMMA TRUE)
      endif()
    endif()
  endforeach()
  foreach(list REAL VIRTUAL OMITTED)
    list(REMOVE_DUPLICATES ${list})
    set(${list} "${${list}}" PARENT_SCOPE)
  endforeach()
  set(WGMMA ${WGMMA} PARENT_SCOPE)
  set(REASON "" PARENT_SCOPE)
endfunction()
