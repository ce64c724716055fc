# Build options, dependencies and the three helper functions every CMakeLists.txt of PageTide uses:
#   pagetide_library(NAME SRCS a.cc … LIBS x …)   static library; headers are found from the repository root
#   pagetide_binary(NAME SRCS a.cc … LIBS x …)    program
#   pagetide_test(NAME SRCS a_test.cc … LIBS x … LABELS unit [TIMEOUT s])   GoogleTest program, one ctest entry a TEST
option(PAGETIDE_WITH_GRPC "Build the services (off: base, core, kvstore, kernels and worker domain only)" ON)
option(PAGETIDE_WITH_CUDA "Build the CUDA device; fails where the toolkit is not" OFF)
option(PAGETIDE_BUILD_TESTS "Build the tests" ON)
option(PAGETIDE_FUZZ "Build tests/fuzz with libFuzzer, all code instrumented (clang only)" OFF)
option(PAGETIDE_PRECOMPILE "Use precompiled headers (GCC only; cmake/Precompiled.cmake)" OFF)
option(PAGETIDE_UNITY "Compile eight files of a library together: a whole build takes half the time, one file's takes longer" OFF)
set(PAGETIDE_SANITIZE "" CACHE STRING "Comma list for -fsanitize= (address,undefined or thread)")

find_program(CCACHE_PROGRAM ccache)
# Not with precompiled headers: for each file ccache would read them once more, hundreds of MB, to hash what it includes.
if(CCACHE_PROGRAM AND NOT CMAKE_CXX_COMPILER_LAUNCHER AND NOT PAGETIDE_PRECOMPILE)
  set(CMAKE_C_COMPILER_LAUNCHER "${CCACHE_PROGRAM}")
  set(CMAKE_CXX_COMPILER_LAUNCHER "${CCACHE_PROGRAM}")
endif()
find_program(LLD_PROGRAM NAMES ld.lld ld.lld-14)
if(LLD_PROGRAM AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  add_link_options(-fuse-ld=lld)
endif()

set(PAGETIDE_WARNINGS -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # False alarms of GCC 12 about std::string (its bugs 105329 and 105651); clang's checks of the same name stay on.
  list(APPEND PAGETIDE_WARNINGS -Wno-array-bounds -Wno-restrict -Wno-stringop-overflow -Wno-stringop-overread)
endif()
add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:${PAGETIDE_WARNINGS}>")
# One position for libraries and programs: there are no shared libraries, and the same flags everywhere let all share
# their precompiled headers.
add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-fPIE;-pthread>")
add_link_options(-pie)
if(CMAKE_BUILD_TYPE STREQUAL "RelWithDebInfo")
  # Line tables are enough for stack traces and profilers, and halve the size of objects and links.
  set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -g1 -DNDEBUG")
endif()
# Programs that listen are hardened: read-only relocations, stack protector, checked libc calls.
add_compile_options("$<$<CONFIG:Release>:-fstack-protector-strong;-U_FORTIFY_SOURCE;-D_FORTIFY_SOURCE=3>")
add_link_options("$<$<CONFIG:Release>:-Wl,-z,relro,-z,now>")
if(PAGETIDE_SANITIZE)
  # Compiles in two thirds of the time; the instrumentation is what counts there.
  string(REPLACE "-O2" "-O1" CMAKE_CXX_FLAGS_RELWITHDEBINFO "${CMAKE_CXX_FLAGS_RELWITHDEBINFO}")
  set(PAGETIDE_SANITIZERS -fsanitize=${PAGETIDE_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:${PAGETIDE_SANITIZERS}>")
  add_link_options(-fsanitize=${PAGETIDE_SANITIZE})
endif()
if(PAGETIDE_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "PAGETIDE_FUZZ needs clang; this is ${CMAKE_CXX_COMPILER_ID}")
  endif()
  # Every library of ours reports its branches to the fuzzer; main comes with the target's link.
  add_compile_options(-fsanitize=fuzzer-no-link,address,undefined -fno-omit-frame-pointer
                      -fno-sanitize=vptr -fno-sanitize-recover=undefined)
  add_link_options(-fsanitize=address,undefined -fno-sanitize=vptr)
endif()

# Tests are not optimised, what they test is: two thirds of the time to compile.
set(PAGETIDE_TEST_OPTIONS "$<$<CONFIG:RelWithDebInfo>:-O0>")

# pagetide_generated(TARGET): code that protoc wrote is not ours to warn about, to tune or to instrument. -O1 halves its
# compile time, -O0 (Debug, and with sanitizers) does so again; sanitizers, which would find nothing in it that they do
# not find at its callers, triple it.
function(pagetide_generated target)
  if(PAGETIDE_SANITIZE)
    target_compile_options(${target} PRIVATE -w -O0 -fno-sanitize=all)
  else()
    target_compile_options(${target} PRIVATE -w "$<$<NOT:$<CONFIG:Debug>>:-O1>")
  endif()
  set_target_properties(${target} PROPERTIES CXX_CLANG_TIDY "")
endfunction()

find_package(Threads REQUIRED)
find_package(absl CONFIG REQUIRED)
find_package(OpenSSL REQUIRED)
find_package(spdlog CONFIG REQUIRED)
find_package(nlohmann_json CONFIG REQUIRED)
find_package(CLI11 CONFIG REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
if(PAGETIDE_WITH_GRPC)
  find_package(Protobuf REQUIRED)
  find_package(gRPC CONFIG REQUIRED)
endif()

if(PAGETIDE_WITH_CUDA)
  # A toolkit of the system, or the one that deploy/setup.sh --cuda installs.
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    file(GLOB PAGETIDE_CUDA_BIN "${PROJECT_SOURCE_DIR}/build/tools/cuda/lib/python3*/site-packages/nvidia/cu13/bin")
    find_program(PAGETIDE_NVCC nvcc PATHS /usr/local/cuda/bin ${PAGETIDE_CUDA_BIN})
    if(NOT PAGETIDE_NVCC)
      message(FATAL_ERROR "PAGETIDE_WITH_CUDA is on, but there is no nvcc: install a CUDA toolkit, or run deploy/setup.sh --cuda")
    endif()
    set(CMAKE_CUDA_COMPILER "${PAGETIDE_NVCC}")
  endif()
  enable_language(CUDA)
  if(CCACHE_PROGRAM AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
    set(CMAKE_CUDA_COMPILER_LAUNCHER "${CCACHE_PROGRAM}")
  endif()
  set(CMAKE_CUDA_STANDARD 17)  # CMake 3.25 knows no C++20 for CUDA
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  # CMake 3.25 sets properties of this target without asking whether CUDA 13 still has the library.
  add_library(CUDA::nvToolsExt INTERFACE IMPORTED)
  find_package(CUDAToolkit REQUIRED)
endif()

function(pagetide_library name)
  cmake_parse_arguments(ARG "" "" "SRCS;LIBS;PRIVATE_LIBS" ${ARGN})
  add_library(${name} STATIC ${ARG_SRCS})
  target_include_directories(${name} PUBLIC "${PROJECT_SOURCE_DIR}")
  target_link_libraries(${name} PUBLIC ${ARG_LIBS} PRIVATE ${ARG_PRIVATE_LIBS})
  set_target_properties(${name} PROPERTIES UNITY_BUILD ${PAGETIDE_UNITY} UNITY_BUILD_BATCH_SIZE 8)
  # With sanitizers what includes gRPC takes half the time to compile when it is not optimised, and waits more than it computes.
  if(PAGETIDE_SANITIZE AND "${ARG_LIBS};${ARG_PRIVATE_LIBS}" MATCHES "pt_proto|pt_rpc|pt_page_store_service|gRPC::")
    target_compile_options(${name} PRIVATE -O0)
  endif()
endfunction()

# pagetide_cold(TARGET…): command lines, configuration, putting programs together: what runs once. Not optimised in the build
# that tests run in; of a program's main, with CLI11's templates, that takes 10 s instead of 30. Release optimises all.
function(pagetide_cold)
  foreach(target IN LISTS ARGN)
    target_compile_options(${target} PRIVATE "$<$<CONFIG:RelWithDebInfo>:-O0>")
  endforeach()
endfunction()

function(pagetide_binary name)
  cmake_parse_arguments(ARG "" "" "SRCS;LIBS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}")
  target_link_libraries(${name} PRIVATE ${ARG_LIBS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
endfunction()

if(PAGETIDE_BUILD_TESTS)
  find_package(GTest CONFIG REQUIRED)
  include(GoogleTest)
endif()
function(pagetide_test name)
  cmake_parse_arguments(ARG "ALONE" "TIMEOUT" "SRCS;LIBS;LABELS" ${ARGN})
  # ALONE: a fleet whose deadlines mean something only if no other test takes the processors.
  if(ARG_ALONE)
    set(serial TRUE)
  else()
    set(serial FALSE)
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  list(GET ARG_LABELS 0 first_label)
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 600)
  endif()
  add_executable(${name} ${ARG_SRCS})
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}")
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} GTest::gmock GTest::gtest GTest::gtest_main)
  target_compile_options(${name} PRIVATE ${PAGETIDE_TEST_OPTIONS})
  target_compile_definitions(${name} PRIVATE PAGETIDE_SOURCE_DIR="${PROJECT_SOURCE_DIR}"
                                             PAGETIDE_BINARY_DIR="${CMAKE_BINARY_DIR}")
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/tests")
  # Values of parameters may print as addresses, which differ from run to run: NO_PRETTY_VALUES.
  gtest_discover_tests(${name} TEST_PREFIX "${name}." DISCOVERY_TIMEOUT 300 NO_PRETTY_VALUES
                       PROPERTIES LABELS "${first_label}" TIMEOUT ${ARG_TIMEOUT} RUN_SERIAL ${serial})
  # A list does not survive the discovery's script: all labels are set again behind it.
  list(LENGTH ARG_LABELS num_labels)
  if(num_labels GREATER 1)
    set(labels_file "${CMAKE_CURRENT_BINARY_DIR}/${name}_labels.cmake")
    file(WRITE "${labels_file}"
         "foreach(test IN LISTS ${name}_TESTS)\n"
         "  set_tests_properties(\"\${test}\" PROPERTIES LABELS \"${ARG_LABELS}\")\n"
         "endforeach()\n")
    set_property(DIRECTORY APPEND PROPERTY TEST_INCLUDE_FILES "${labels_file}")
  endif()
endfunction()
