# Precompiled headers, for whole builds on small machines (the presets dev, release, asan and tsan turn them on): the headers of Abseil,
# of GoogleTest and, for tests, of gRPC and PageTide's protocol are parsed once for all files instead of once a file. Who builds the same
# tree again and again is better off with ccache, which does not go with them: -DPAGETIDE_PRECOMPILE=OFF.
#
# A precompiled header brings the code that its templates were made into along, too: that of gRPC and the protocol takes as long to
# compile anew in each file as their headers do to read (8 s). It pays where every test's file needs most of it (12.5 s instead of
# 14.8 s), and neither in services, which are compiled eight files together (22 s instead of 17 s), nor with sanitizers.
#
# Included last (its option stands in PageTide.cmake): pagetide_precompile() runs when every target is known, and picks for each the header that fits what it links.
# GCC uses a precompiled header only for files that are compiled with the very flags it was made with, and reads the plain
# headers otherwise: targets with code generation of their own (kernels, decoder, libraries for tests) get none.

# Sets OUT to TRUE if TARGET links NEEDLE, directly or through other targets of this build.
function(pagetide_links target needle out)
  set(todo ${target})
  set(seen)
  while(todo)
    list(POP_FRONT todo current)
    if(current IN_LIST seen OR NOT TARGET ${current})
      continue()
    endif()
    list(APPEND seen ${current})
    foreach(property LINK_LIBRARIES INTERFACE_LINK_LIBRARIES)
      get_target_property(libraries ${current} ${property})
      if(libraries)
        if("${needle}" IN_LIST libraries)
          set(${out} TRUE PARENT_SCOPE)
          return()
        endif()
        list(APPEND todo ${libraries})
      endif()
    endforeach()
  endwhile()
  set(${out} FALSE PARENT_SCOPE)
endfunction()

# The targets of DIRECTORY and of all below it.
function(pagetide_targets_below directory out)
  get_property(found DIRECTORY "${directory}" PROPERTY BUILDSYSTEM_TARGETS)
  get_property(subdirectories DIRECTORY "${directory}" PROPERTY SUBDIRECTORIES)
  foreach(subdirectory IN LISTS subdirectories)
    pagetide_targets_below("${subdirectory}" below)
    list(APPEND found ${below})
  endforeach()
  set(${out} ${found} PARENT_SCOPE)
endfunction()

# pagetide_precompiled_header(NAME HEADER LIBS…): a target that compiles HEADER
function(pagetide_precompiled_header name header)
  add_library(${name} OBJECT "${PROJECT_SOURCE_DIR}/cmake/precompiled/empty.cc")
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}")
  target_link_libraries(${name} PRIVATE ${ARGN})
  target_precompile_headers(${name} PRIVATE "${PROJECT_SOURCE_DIR}/cmake/precompiled/${header}.h")
endfunction()

function(pagetide_precompile)
  pagetide_targets_below("${PROJECT_SOURCE_DIR}" targets)
  get_property(common_options DIRECTORY "${PROJECT_SOURCE_DIR}" PROPERTY COMPILE_OPTIONS)
  foreach(target IN LISTS targets)
    get_target_property(type ${target} TYPE)
    get_target_property(options ${target} COMPILE_OPTIONS)
    pagetide_links(${target} GTest::gtest tests)
    list(REMOVE_ITEM options ${common_options})
    # What pagetide_test() gives to every test, and nothing else has.
    set(own_options)
    if(tests)
      set(own_options "${PAGETIDE_TEST_OPTIONS}")
    endif()
    if(NOT type MATCHES "STATIC_LIBRARY|EXECUTABLE" OR NOT "${options}" STREQUAL "${own_options}")
      continue()
    endif()
    pagetide_links(${target} pt_proto speaks)
    if(speaks AND (PAGETIDE_SANITIZE OR NOT tests))
      continue()
    endif()
    if(speaks)
      set(header service_tests)
      set(libs pt_proto)
    else()
      set(header domain)
      set(libs absl::statusor absl::str_format absl::time absl::flat_hash_map)
      if(tests)
        string(APPEND header "_tests")
      endif()
    endif()
    if(tests)
      list(APPEND libs GTest::gmock GTest::gtest)
    endif()
    set(precompiled "pt_precompiled_${header}")
    if(NOT TARGET ${precompiled})
      pagetide_precompiled_header(${precompiled} ${header} ${libs})
      if(tests)
        target_compile_options(${precompiled} PRIVATE ${own_options})
      endif()
    endif()
    target_precompile_headers(${target} REUSE_FROM ${precompiled})
  endforeach()
endfunction()

if(PAGETIDE_PRECOMPILE AND NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(STATUS "No precompiled headers: they are for GCC, and this is ${CMAKE_CXX_COMPILER_ID}")
elseif(PAGETIDE_PRECOMPILE)
  cmake_language(DEFER DIRECTORY "${PROJECT_SOURCE_DIR}" CALL pagetide_precompile)
endif()
