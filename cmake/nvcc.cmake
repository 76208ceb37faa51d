# Which nvcc the build takes, and whether that one compiles. bench/toolkit.py looks in the same
# order; tests/test_build.py runs this file by itself (cmake -P), with made-up compilers.

# <program> and <flags> of $CUDACXX, as CMake reads it; "" where it is blank.
function(specrt_split_cudacxx out_program out_flags)
  separate_arguments(flags UNIX_COMMAND "$ENV{CUDACXX}")
  set(program "")
  if(flags)
    list(POP_FRONT flags program)
  endif()
  set(${out_program} "${program}" PARENT_SCOPE)
  set(${out_flags} "${flags}" PARENT_SCOPE)
endfunction()

# <nvcc>: CMAKE_CUDA_COMPILER, or the first of $CUDACXX, nvcc on PATH, in $CUDA_HOME/bin, in
# $CUDA_PATH/bin and in SPECRT_USUAL_CUDA/bin; "" if there is none, and then <reason> says so.
function(specrt_find_nvcc out_nvcc out_reason)
  set(nvcc NOTFOUND)  # find_program searches for what has no value yet
  set(reason "")
  specrt_split_cudacxx(program flags)
  if(CMAKE_CUDA_COMPILER)
    set(nvcc "${CMAKE_CUDA_COMPILER}")
  elseif(NOT program STREQUAL "")  # one that was asked for is never replaced
    find_program(nvcc NAMES "${program}" NO_CACHE)
    if(NOT nvcc)
      set(reason "CUDACXX names ${program}, which is not there")
    endif()
  else()
    if(NOT DEFINED SPECRT_USUAL_CUDA)
      set(SPECRT_USUAL_CUDA /usr/local/cuda)
    endif()
    set(folders "")
    foreach(home "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}" "${SPECRT_USUAL_CUDA}")
      if(NOT home STREQUAL "")
        list(APPEND folders "${home}/bin")
      endif()
    endforeach()
    find_program(nvcc nvcc PATHS ENV PATH ${folders}
                 NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH NO_CACHE)
    if(NOT nvcc)
      list(JOIN folders " or " folders)
      set(reason "no nvcc was found on PATH or in ${folders}")
    endif()
  endif()
  if(NOT nvcc)
    set(nvcc "")
  endif()
  set(${out_nvcc} "${nvcc}" PARENT_SCOPE)
  set(${out_reason} "${reason}" PARENT_SCOPE)
endfunction()

# The flags that the compiler is to be tried with: those a build would give it.
function(specrt_nvcc_flags architectures out_flags)
  if(DEFINED CMAKE_CUDA_FLAGS)
    separate_arguments(flags UNIX_COMMAND "${CMAKE_CUDA_FLAGS}")
  else()
    separate_arguments(flags UNIX_COMMAND "$ENV{CUDAFLAGS}")
    specrt_split_cudacxx(program own_flags)
    list(PREPEND flags ${own_flags})
  endif()
  set(host "${CMAKE_CUDA_HOST_COMPILER}")
  if(NOT host)
    set(host "$ENV{CUDAHOSTCXX}")
  endif()
  if(NOT host STREQUAL "")
    list(APPEND flags -ccbin "${host}")
  endif()
  foreach(architecture ${architectures})
    # Not native, all and all-major: what they come to is CMake's to say.
    if(architecture MATCHES "^([0-9]+[af]?)")
      list(APPEND flags "-gencode=arch=compute_${CMAKE_MATCH_1},code=sm_${CMAKE_MATCH_1}")
    endif()
  endforeach()
  set(${out_flags} "-std=c++17;${flags}" PARENT_SCOPE)
endfunction()

# <reason>: "" if <nvcc> compiles and links a kernel for the architectures; else the end of what it
# printed, and <nvcc>'s name before it. A success is remembered, a failure is not: it may be mended.
function(specrt_try_nvcc nvcc architectures out_reason)
  specrt_nvcc_flags("${architectures}" flags)
  set(tried "${nvcc} ${flags}")
  set(${out_reason} "" PARENT_SCOPE)
  if(tried STREQUAL "${SPECRT_NVCC_TRIED}")
    return()
  endif()
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/nvcc_try")
  file(WRITE "${folder}/try.cu" [[
#include <cuda_bf16.h>
#include <string>
__global__ void kernel(__nv_bfloat16* x) { *x = __float2bfloat16(1.0f); }
int main() {
    kernel<<<1, 1>>>(nullptr);
    return std::string("a").size() != 1;
}
]])
  execute_process(COMMAND "${nvcc}" ${flags} "${folder}/try.cu" -o "${folder}/try"
                  WORKING_DIRECTORY "${folder}" TIMEOUT 300 RESULT_VARIABLE status
                  OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(status EQUAL 0)
    set(SPECRT_NVCC_TRIED "${tried}" CACHE INTERNAL "what has been seen to compile")
    return()
  endif()
  string(STRIP "${output}" output)
  if(output STREQUAL "")
    set(output "it printed nothing and gave: ${status}")
  endif()
  string(REGEX MATCH "([^\n]*\n)?([^\n]*\n)?([^\n]*\n)?([^\n]*\n)?[^\n]*$" end "${output}")
  set(${out_reason} "${nvcc} cannot compile:\n${end}" PARENT_SCOPE)
endfunction()

# <nvcc>: the one to build with, "" if there is none; then <reason> says why, in one line or more.
function(specrt_choose_nvcc architectures out_nvcc out_reason)
  specrt_find_nvcc(nvcc reason)
  if(nvcc)
    specrt_try_nvcc("${nvcc}" "${architectures}" reason)
  endif()
  if(NOT reason STREQUAL "")
    set(nvcc "")
  endif()
  set(${out_nvcc} "${nvcc}" PARENT_SCOPE)
  set(${out_reason} "${reason}" PARENT_SCOPE)
endfunction()

# Why there are no CUDA kernels: with ON that is an error, else each line of it is a line of ours.
function(specrt_say_no_cuda mode reason)
  if(mode STREQUAL "ON")
    string(REPLACE "\n" "\n  " reason "${reason}")
    message(FATAL_ERROR "SPECRT_CUDA=ON, but ${reason}")
  endif()
  string(REPLACE "\n" "\n-- specrt:   " reason "${reason}")
  message(STATUS "specrt: CPU backend only: ${reason}")
endfunction()
